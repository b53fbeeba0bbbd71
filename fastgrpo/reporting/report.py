"""A run as one page that anyone can open: `report.html`, a single file without network or scripts.

    fastgrpo report runs/tiny_shapes

It reads only the run's files, so it works while a run goes on, after one was killed, and on a machine without torch. What
a run does not have (yet) becomes a sentence. report_template.html lays out the page; here its holes are filled.
"""

import html
from pathlib import Path
from string import Template

from fastgrpo.files import atomic_file
from fastgrpo.reporting import report_curves, report_pictures, report_scores
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.reporting.saved_run import SavedRun, read_run

TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(folder: Path) -> Path:
    """Writes the report of the run in `folder` and returns its path; FileNotFoundError where there is no run."""
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(_holes(read_run(folder)))
    path = RunFolder(folder).report
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return path


def _holes(run: SavedRun) -> dict[str, str]:
    """The text of each hole in the template."""
    return {
        "name": html.escape(run.name),
        "status": _status(run),
        "headline": report_scores.headline(run),
        "facts": report_scores.facts(run),
        "training": report_curves.training(run),
        "categories": report_scores.categories(run),
        "samples": report_pictures.samples(run),
        "film": report_pictures.film(run),
        "health": report_curves.health(run),
        "time": report_curves.time(run),
        "footer": _footer(run),
        "config": f"<pre>{html.escape(run.config or 'no config.yaml')}</pre>",
    }


def _status(run: SavedRun) -> str:
    if run.summary:
        return f'<span class="status done">{html.escape(str(run.summary.get("status", "finished")))}</span>'
    return '<span class="status open">running, or interrupted</span>'


def _footer(run: SavedRun) -> str:
    left_out = f"Unreadable lines left out: {run.unreadable}. " if run.unreadable else ""
    return left_out + "Written by fastgrpo from the files of the run."
