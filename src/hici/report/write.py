"""The report: gathered results in, a directory with index.html and its pictures out."""

from __future__ import annotations

import logging
from pathlib import Path

from hici._version import __version__
from hici.files import atomic_directory, check_target, read_json, write_json, write_text
from hici.processes import only_run_in
from hici.report.figures import png_bytes
from hici.report.gather import REPORT_MARKER, Gathered
from hici.report.numbers import listing
from hici.report.page import Figure, Part, Picture, render_page
from hici.report.section import all_sections

logger = logging.getLogger(__name__)

PAGE = "index.html"


def write_report(gathered: Gathered, target: str | Path, *, overwrite: bool = False) -> Path:
    """Draw everything and write it as a whole: `target`/index.html, which needs nothing else, and the pictures as PNGs.

    An earlier report at `target` is replaced; so is one to which files were added, with `overwrite`.

    Raises:
        ValueError: see `check_report_target`; another process is writing there.
    """
    target = Path(target)
    check_report_target(target, overwrite=overwrite)
    parts = [Part(section.title, section.draw(gathered)) for section in all_sections() if section.applies(gathered)]
    pictures = {block.name: _picture(block) for part in parts for block in part.blocks if isinstance(block, Figure)}
    page = render_page(report_title(gathered), _lead(gathered), parts, pictures, f"Drawn by hici {__version__}.")
    lock = f".{target.name}.lock"
    with only_run_in(target.parent, lock):
        try:
            with atomic_directory(target, overwrite=True, marker=REPORT_MARKER) as directory:
                write_text(directory / PAGE, page)
                for name, picture in pictures.items():
                    (directory / f"{name}.png").write_bytes(picture.wide)
                names = sorted(path.name for path in directory.iterdir())
                write_json(directory / REPORT_MARKER, {"hici": __version__, "files": names})
        finally:
            (target.parent / lock).unlink(missing_ok=True)
    return target / PAGE


def check_report_target(target: str | Path, *, overwrite: bool = False) -> None:
    """Whether a report may be written at `target`: a new or empty directory, or an earlier report.

    Raises:
        ValueError: something else is there; files were added to the earlier report, without `overwrite`.
    """
    target = Path(target)
    check_target(target, overwrite=True, marker=REPORT_MARKER)
    marker = target / REPORT_MARKER
    if overwrite or not marker.is_file():
        return
    record = read_json(marker)
    own = set(record.get("files", [])) if isinstance(record, dict) else set()
    added = sorted(path.name for path in target.iterdir() if path.name not in own | {REPORT_MARKER})
    if added:
        raise ValueError(
            f"{target} holds files that the report there did not write ({', '.join(added)}), and drawing it anew would "
            "delete them; move them, give another --out, or --overwrite"
        )


def report_title(gathered: Gathered) -> str:
    """Of the page."""
    labels = gathered.labels
    return "HiCI report: " + (listing(labels) if len(labels) <= 3 else f"{len(labels)} runs")


def _lead(gathered: Gathered) -> str:
    """What is compared, in a sentence or two."""
    counts = [
        (len(gathered.results), "result", "results"),
        (len(gathered.runs), "training run", "training runs"),
        (len(gathered.comparisons), "training comparison", "training comparisons"),
    ]
    what = listing([f"{count} {one if count == 1 else many}" for count, one, many in counts if count])
    of = f", of {listing(gathered.labels)}" if len(gathered.labels) > 1 else ""
    tasks = list(dict.fromkeys(result.record["task"] for result in gathered.results))
    measured = f" Measured: {listing(tasks)}." if tasks else ""
    return f"{what}{of}.{measured}"


def _picture(figure: Figure) -> Picture:
    logger.info("drawing %s", figure.name)
    return Picture(png_bytes(figure.draw(False)), png_bytes(figure.draw(True), narrow=True))
