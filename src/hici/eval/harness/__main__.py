"""lm-eval's own command, which knows the model type "hici" here."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
