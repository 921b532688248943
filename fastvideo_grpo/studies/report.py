"""The pages: Markdown for docs/, self-contained HTML for a browser, both from the same blocks."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo_grpo.studies import statistics
from fastvideo_grpo.studies.definitions import BEFORE, MEASURES
from fastvideo_grpo.studies.measurement import SAMPLES
from fastvideo_grpo.studies.results import Results


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG; ``file`` is its name beside the Markdown page."""

    file: str
    content: bytes
    alt: str


Block = Heading | Text | Table | Picture


_WHO = {
    True: "The paper compares ways of doing GRPO on Stable Diffusion, FLUX and HunyuanVideo with learned rewards.",
    False: "The methods' papers compare ways of doing GRPO on models of billions of parameters with learned rewards.",
}


def introduction(studies: Sequence[Results]) -> list[Block]:
    """What these pages are, how the numbers came about, and how a claim is judged."""
    seeds = min(results.seeds for results in studies)
    return [
        Text(
            f"{_WHO[any(results.study.of_the_paper for results in studies)]} Here the "
            "same comparisons are made on models so small that a run takes a minute on a CPU core, with rewards that are a "
            "few lines of code. What holds here need not hold there, nor the other way round: these pages show that the code "
            "does what a comparison needs, and what it measures at this size. Each study says how it differs from its original."
        ),
        Text(
            "**Budgets.** All arms of a study may take the same number of network evaluations: a forward of a sample counts "
            "1, one with its backward 3, each pass of guidance by itself. So cheaper iterations are more iterations. "
            "Evaluations and pictures are not counted."
        ),
        Text(
            f"**Measures.** After training, {SAMPLES} samples of each prompt, trained on and kept out, are drawn with the ODE "
            "sampler from noise that is the same for all runs. Numbers are means over seeds ± their standard "
            "error; differences are taken seed by seed, since runs of one seed share prompts and noise. The points of the "
            "curves take the first few of these samples."
        ),
        Text(
            "**Verdicts.** A claimed difference is *shown* if it is at least 2 standard errors in the claimed direction, "
            "*contradicted* if it is 2 in the other, else *not shown*. Where the paper claims no difference, *not told "
            "apart* means less than 2 standard errors, which is weak agreement: few seeds tell little apart. With "
            f"{seeds} seeds, 2 standard errors come about by chance in {statistics.chance(seeds):.0%} of comparisons where "
            "there is no difference, so single verdicts near 2 mean little."
            if seeds > 1
            else "**Verdicts.** None: a single seed has no standard error."
        ),
    ]


def summary(studies: Sequence[Results]) -> Table:
    """All studies at a glance."""
    rows = [[_link(r), f"{r.study.claim} ({r.study.source})", r.seen(), r.verdict()] for r in studies]
    return Table(["study", "the paper", "seen here", "verdict"], rows)


def _link(results: Results) -> str:
    return f"[{results.study.title}](#{results.study.title.lower().replace(' ', '-')})"


def section(results: Results, level: int = 2) -> list[Block]:
    """One study: claim, table, curves, comparisons, pictures."""
    study = results.study
    blocks: list[Block] = [
        Heading(level, study.title),
        Text(study.question),
        Text(f"**{'The paper' if study.of_the_paper else 'Their papers'}** ({study.source}): {study.claim}"),
        Text(f"**Here:** {study.miniature}"),
        Text(f"**Seen:** {results.seen()}"),
        Text(f"**Verdict: {results.verdict()}.**"),
        *([Text(f"Learning rates: {_searched(results)}.")] if results.made.get("searched") else []),
        table(results),
        Text("Columns: " + "; ".join(f"{measure}: {MEASURES[measure]}" for measure in _columns(results)) + "."),
        comparisons(results),
    ]
    if "until" in study.measures:
        blocks.append(Text(f"**until, seed by seed:** {'; '.join(results.by_seed('until')) or 'none reached it'}."))
    blocks += [Text(f"Not as planned: {line}.") for line in results.miscounted()]
    for label in results.arms:
        blocks += [Text(f"**Failed:** {label}, seed {seed}: {why}") for seed, why in results.failed(label).items()]
    if "error" in results.before:
        blocks.append(Text(f"**Failed:** {BEFORE}: {results.before['error']}"))
    blocks += [Text(f"**Not measured:** {line}.") for line in results.not_measured()]
    if any(run["curve"] for label in results.arms for run in results.finished(label).values()):
        blocks.append(Picture(f"{study.name}_curves.png", curves(results), f"{study.title}: curves"))
    pictures = picture_rows(results)
    if pictures is not None:
        sheet, prompts = pictures
        blocks.append(Picture(f"{study.name}_pictures.png", sheet, f"{study.title}: pictures of the first seed"))
        blocks.append(Text(f"The first seed's pictures, from the same noise: {', '.join(prompts)}."))
    return blocks


def _searched(results: Results) -> str:
    """What each arm took of what it could."""
    return "; ".join(f"{label} {value.partition('=')[2]}" for label, value in results.made["searched"].items())


def _columns(results: Results) -> list[str]:
    used = [*results.study.measures, *(c.measure for c in results.study.comparisons)]
    return list(dict.fromkeys(used))


def table(results: Results) -> Table:
    """A row for each arm, the untrained model first."""
    columns = _columns(results)
    rows = [[BEFORE, "", "", *(_cell(results, BEFORE, c) for c in columns), "", "", ""]]
    for label, by_seed in results.arms.items():
        runs = list(results.finished(label).values())
        rows.append(
            [
                label,
                str(max((run["iterations"] for run in runs), default="")),
                "" if (spent := results.spent(label)) is None else f"{spent:.0f}",
                *(_cell(results, label, column) for column in columns),
                f"{results.below_untrained(label)} of {len(runs)}",
                f"{results.not_finite(label)} of {len(runs)}",
                f"{sum(run['seconds'] for run in runs) / len(runs):.0f}" if runs else f"0 of {len(by_seed)} ended",
            ]
        )
    header = ["arm", "iterations", "evaluations each", *columns, "below untrained", "not finite", "seconds a run"]
    return Table(header, rows)


def _cell(results: Results, label: str, measure: str) -> str:
    if measure == "ratio_dev":  # 0, or a number that three decimals would hide
        found = [value for value in results.values(label, measure).values() if value is not None]
        return f"{max(found):.2g}" if found else ""
    value = results.estimate(label, measure)
    return "" if value.mean is None else str(value)


def comparisons(results: Results) -> Table:
    """The claim, piece by piece."""
    rows = [
        [
            f"{j.comparison.first} {j.comparison.relation} {j.comparison.second}",
            j.comparison.measure,
            str(j.first),
            str(j.second),
            f"{j.found.mean:+.3f}" + (f" ± {j.found.error:.3f}" if j.found.error is not None else "")
            if j.found.mean is not None
            else "",
            j.verdict + (f": {j.why}" if j.why else ""),
        ]
        for j in results.judge()
    ]
    claim = "the paper's claim" if results.study.of_the_paper else "claim"
    return Table([claim, "measure", "first", "second", "difference", "verdict"], rows)


def curves(results: Results) -> bytes:
    """``colour_match`` against network evaluations: mean over seeds, and a standard error to each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label in results.arms:
        runs = list(results.finished(label).values())
        if not runs:
            continue
        points: dict[int, list[dict[str, float | None]]] = {}
        for run in runs:
            for point in run["curve"]:
                points.setdefault(point["iteration"], []).append(point)
        # Runs whose steps are drawn spend not quite alike.
        x = [sum(point["spent"] for point in of) / len(of) / 1000 for of in points.values()]
        estimates = [statistics.estimate([point["colour_match"] for point in of]) for of in points.values()]
        y = [float("nan") if e.mean is None else e.mean for e in estimates]
        spread = [e.error or 0.0 for e in estimates]
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=label)
        axes.fill_between(
            x,
            [m - s for m, s in zip(y, spread, strict=True)],
            [m + s for m, s in zip(y, spread, strict=True)],
            alpha=0.2,
            color=line.get_color(),
        )
    axes.set_xlabel("thousand network evaluations")
    axes.set_ylabel("colour_match (ODE sampler, fixed noise)")
    axes.set_title(f"{results.study.title}: mean ± standard error over {results.seeds} seeds", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, dpi=90, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return file.getvalue()


def picture_rows(results: Results) -> tuple[bytes, list[str]] | None:
    """Fixed prompts and noise under the untrained model and each arm's first seed, and the prompts; None where no pictures
    were kept."""
    from PIL import Image

    from fastvideo_grpo.tracking.pictures import rows

    found = []
    prompts: list[str] = []
    for label in (BEFORE, *results.arms):
        run = results.before if label == BEFORE else results.arms[label].get(0, {})
        file = Path(run.get("folder", ".")) / "pictures.png"
        if file.is_file():
            picture = Image.open(file).convert("RGB")
            prompts = run["pictured"]
            found.append((picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST), label))
    if not found:
        return None
    sheet = io.BytesIO()
    rows([picture for picture, _ in found], [label for _, label in found]).save(sheet, format="png")
    return sheet.getvalue(), prompts


def provenance(studies: Sequence[Results]) -> list[Block]:
    """How the numbers came about: a row for each command."""
    commands: dict[tuple[str, ...], list[Results]] = {}
    for results in studies:
        made = results.made
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        key = (made["command"], f"{made['machine']}, {made['cores']} cores", versions, str(made["commit"]), made["date"])
        commands.setdefault(key, []).append(results)
    rows = [
        [
            f"`{command}`",
            machine,
            versions,
            commit,
            date,
            f"{max(r.made['seconds'] for r in of):.0f} ({sum(_run_seconds(r) for r in of):.0f} of runs)",
        ]
        for (command, machine, versions, commit, date), of in commands.items()
    ]
    return [
        Heading(2, "How it was made"),
        Table(["command", "machine", "versions", "commit", "date", "seconds"], rows),
        Text(
            "The seconds of the command are its own; runs that an earlier command had finished already were not made again, "
            "and runs that studies share count in each of them."
        ),
    ]


def _run_seconds(results: Results) -> float:
    return sum(run["seconds"] for label in results.arms for run in results.finished(label).values())


def markdown(blocks: Sequence[Block], images: Path, link: str) -> str:
    """Blocks as Markdown; pictures are written into ``images`` and linked as ``link/FILE``."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Table):
            lines = [block.header, ["---"] * len(block.header), *block.rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
        elif isinstance(block, Picture):
            images.mkdir(parents=True, exist_ok=True)
            (images / block.file).write_bytes(block.content)
            parts.append(f"![{block.alt}]({link}/{block.file})")
        else:
            parts.append(block.text)
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #bbb; padding: 3px 8px; text-align: left; vertical-align: top; font-size: 13px }
th { background: #eee }
img { max-width: 100% }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """Blocks as one HTML file, pictures inside."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            anchor = block.text.lower().replace(" ", "-")
            parts.append(f'<h{block.level} id="{html.escape(anchor)}">{html.escape(block.text)}</h{block.level}>')
        elif isinstance(block, Table):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
            body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        elif isinstance(block, Picture):
            data = base64.b64encode(block.content).decode()
            parts.append(f'<img alt="{html.escape(block.alt)}" src="data:image/png;base64,{data}">')
        else:
            parts.append(f"<p>{_inline(block.text)}</p>")
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>\n{body}\n'


def _inline(text: str) -> str:
    """The few marks that the texts here use: **bold**, *emphasis*, `code` and [link](#anchor)."""
    escaped = html.escape(text)
    for pattern, put in (
        (r"\*\*(.+?)\*\*", r"<b>\1</b>"),
        (r"\*(.+?)\*", r"<i>\1</i>"),
        (r"`(.+?)`", r"<code>\1</code>"),
        (r"\[(.+?)\]\((#.+?)\)", r'<a href="\2">\1</a>'),
    ):
        escaped = re.sub(pattern, put, escaped)
    return escaped
