"""The `hici` command: one file a verb.

A module here with `add_parser(subparsers)` and `run(args) -> int | None` is the verb of its name; `group_name.py` is
`hici group name`, where `group.py` is a verb of its own that holds the others. Modules import torch inside of `run`
only, so that every `--help` is quick. `main.py` and `common.py` are no verbs.
"""
