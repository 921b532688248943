"""The parts of the package, their sizes, who imports whom, and the way of a trajectory: ``python docs/architecture.py``
writes the tables of docs/architecture.md and its picture anew."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastvideo_grpo"
DOCUMENT = ROOT / "docs" / "architecture.md"

PICTURE = ROOT / "docs" / "images" / "trajectory.png"


@dataclass(frozen=True)
class Stop:
    """A place a trajectory comes through.

    ``does``: what happens there. ``file``, ``names``: where, in the package. ``leaves``: what goes on from there.
    """

    does: str
    file: str
    names: tuple[str, ...]
    leaves: str


ROLLOUT = (
    Stop("prompts, dealt to ranks", "grpo/dealing.py", ("rollout_batches",), "(group, members) of B samples"),
    Stop("what the network is told", "trainers/policy.py", ("conditioning",), "tensors [B, ...]"),
    Stop("noise of each sample", "sampling/noise.py", ("initial_noise", "step_noise"), "[B, C, F, H, W] on the CPU"),
    Stop("T steps to data", "sampling/rollout.py", ("rollout",), "latents [B, n+1, ...]\nlog_probs [B, n]"),
    Stop("decoding", "trainers/stages.py", ("LeaderDecodingStage",), "media uint8 [B, F, H, W, 3]"),
    Stop("rewards", "rewards/reward_set.py", ("submit",), "a score, or why there is none"),
    Stop("everybody's scores", "trainers/scoring.py", ("ScoreTable",), "scores, valid [P, G]"),
)
STEP = (
    Stop("the network, with guidance", "trainers/policy.py", ("predict", "network_output"), "velocity or noise [B, ...]"),
    Stop("mean, deviation, log-prob", "sampling/transitions.py", ("draw_or_replay",), "next latents, log_prob [B]"),
)
UPDATE = (
    Stop("better than its group?", "grpo/advantages.py", ("advantages",), "advantages [P, G]"),
    Stop("who is trained on", "grpo/selection.py", ("best_of", "regroup"), "update micro-batches"),
    Stop("sent to who trains on it", "trainers/replay.py", ("fetch_trajectories",), "latents, old log_probs"),
    Stop("a chosen step once more", "trainers/replay.py", ("TrajectoryReplay",), "log_prob [B] with gradients"),
    Stop("the clipped ratio", "grpo/objectives/grpo.py", ("loss",), "loss [B]"),
    Stop("gradients, then AdamW", "engines/base.py", ("backward", "step"), "weights"),
    Stop("saved", "checkpoints/store.py", ("save",), "checkpoints/ITERATION/"),
)

Graph = dict[str, dict[str, set[str]]]
"""Part -> {"loading": parts it imports when it is loaded, "use": those that a function imports when it is called}."""

Edges = dict[str, set[str]]
"""Who imports whom, whenever: on loading, inside a function, or for type checkers."""


def files() -> list[Path]:
    """Every file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def part_of(module: str) -> str:
    """``fastvideo_grpo.trainers.base`` -> "trainers/", ``fastvideo_grpo.models.wan.trainer`` -> "models/wan/"; a file beside
    the folders stands for itself: "cli.py"."""
    name, *rest = module.split(".")[1:]
    if name == "models" and rest and (PACKAGE / name / rest[0]).is_dir():
        return f"{name}/{rest[0]}/"  # each model has what it needs of all else; nobody needs a model
    return f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"


def module_of(file: Path) -> str:
    names = [*file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """(module of this package, or a name in it; when) of each import statement: on "loading", on "use" inside a function, or
    for "type checking" alone."""
    tree = ast.parse(file.read_text())
    when: dict[int, str] = {}
    for node in ast.walk(tree):  # from the outside in: the innermost counts
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            when.update((id(below), "use") for below in ast.walk(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when.update((id(below), "type checking") for statement in node.body for below in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{_absolute(node, file)}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("fastvideo_grpo."):
                yield name, when.get(id(node), "loading")


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """The module that names are imported from: for ``from .family import X`` in models/wan/ the family of that folder."""
    if node.level == 0:
        return node.module or ""
    package = file.relative_to(ROOT).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def graph() -> Graph:
    """Which part imports which others of this package."""
    found: Graph = defaultdict(lambda: {"loading": set(), "use": set()})
    for file in files():
        module = module_of(file)
        if module == "fastvideo_grpo":
            continue
        own = part_of(module)
        found[own]  # a part that imports nothing is one, too
        for name, when in imported(file):
            if when != "type checking" and (other := part_of(name)) != own and (PACKAGE / other).exists():
                found[own][when].add(other)
    for edges in found.values():
        edges["use"] -= edges["loading"]
    return dict(found)


def layers(edges: Graph) -> list[list[str]]:
    """Parts in an order in which each imports, when it is loaded, those of the lines before only.

    Raises:
        ValueError: there is none; names the parts that import each other in a circle.
    """
    left, order = {part: set(found["loading"]) for part, found in edges.items()}, []
    while left:
        free = sorted(part for part, needs in left.items() if not needs & left.keys())
        if not free:
            raise ValueError(f"parts that import each other in a circle: {', '.join(sorted(left))}")
        order.append(free)
        for part in free:
            del left[part]
    return order


def file_edges() -> Edges:
    """File -> the others that it imports, whenever. (That an import loads the folder's ``__init__.py`` first is left out.)"""
    return {
        _name(file): {_name(other) for name, _ in imported(file) if (other := _file_of(name)) is not None} - {_name(file)}
        for file in files()
    }


def part_edges() -> Edges:
    """Part -> the others that its files import, whenever."""
    modules = {_name(file): module for file in files() if (module := module_of(file)) != PACKAGE.name}
    found: Edges = {part_of(module): set() for module in modules.values()}
    for file, others in file_edges().items():
        if file in modules:
            own = part_of(modules[file])
            found[own] |= {part_of(modules[other]) for other in others if other in modules} - {own}
    return found


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def _file_of(name: str) -> Path | None:
    """Where an imported module or name stands; None: in no file of this package."""
    while name:
        path = ROOT.joinpath(*name.split("."))
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file
        name = name.rpartition(".")[0]
    return None


def circles(edges: Edges) -> list[list[str]]:
    """Those that import each other, directly or by way of others: each circle with all that are in it."""
    reached: Edges = {}
    for start in edges:
        reached[start], left = set(), [start]
        while left:
            new = edges[left.pop()] - reached[start]
            reached[start] |= new
            left += new
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return sorted(sorted(circle) for circle in found if circle)


def sizes_table() -> str:
    """Lines of each part, and its largest files."""
    parts = defaultdict(list)
    for file in files():
        if file.parent != PACKAGE or file.stem != "__init__":
            parts[part_of(module_of(file))].append(file)
    rows = ["| part | files | lines | largest |", "|---|--:|--:|---|"]
    for part, found in sorted(parts.items(), key=lambda item: -sum(map(lines, item[1]))):
        largest = sorted(found, key=lines, reverse=True)[:3] if part.endswith("/") else []
        named = ", ".join(f"`{file.relative_to(PACKAGE / part)}` {lines(file)}" for file in largest)
        rows.append(f"| `{part}` | {len(found)} | {sum(map(lines, found))} | {named} |")
    total = [lines(file) for file in files()]
    return "\n".join([*rows, f"| all | {len(total)} | {sum(total)} | |"])


def imports_table() -> str:
    """Parts from the bottom up, and what each imports."""
    edges = graph()
    rows = ["| layer | part | imports when it is loaded | and when a function needs it |", "|--:|---|---|---|"]
    for number, parts in enumerate(layers(edges)):
        for part in parts:
            cells = (", ".join(f"`{other}`" for other in sorted(edges[part][when])) for when in ("loading", "use"))
            rows.append(f"| {number} | `{part}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def walk_table() -> str:
    """The way of a trajectory, place by place."""
    rows = ["| | where | what happens | what goes on from there |", "|--:|---|---|---|"]
    for part, stops in (("rollout", ROLLOUT), ("each step", STEP), ("update", UPDATE)):
        for number, stop in enumerate(stops, start=1):
            names, leaves = ", ".join(f"`{name}`" for name in stop.names), stop.leaves.replace("\n", ", ")
            rows.append(f"| {part} {number} | `{stop.file}`: {names} | {stop.does} | {leaves} |")
    return "\n".join(rows)


MAY_KNOW = {
    "cli.py": "says what the demo trains",
    "commands/check_reward.py": "an example in its help",
    "commands/demo.py": "trains two of them",
    "commands/export.py": "an example in its help",
    "commands/make_references.py": "an example in its help",
    "commands/sample.py": "an example in its help",
    "commands/serve_reward.py": "an example in its help",
    "commands/train.py": "an example in its help",
    "config/files.py": "an example in an error",
    "config/keys.py": "the default of model.kind",
    "config/reference.py": "an example in docs/configuration.md",
    "models/skyreels_i2v/family.py": "is HunyuanVideo with another transformer",
    "models/skyreels_i2v/fastvideo_config.py": "is HunyuanVideo with another transformer",
    "models/skyreels_i2v/tiny.py": "is HunyuanVideo with another transformer",
    "models/skyreels_i2v/trainer.py": "is HunyuanVideo with another transformer",
    "rewards/models/clip_backend.py": "says where a tokenizer is to be had",
    "studies/definitions.py": "compares runs of three of them",
    "studies/report.py": "says which the paper compares",
}
"""File that names a model and is not in its folder -> why. Recipes, docs and the table of the promises name them, too."""


def model_names() -> dict[str, re.Pattern[str]]:
    """Folder of a model -> how it is called: by that name, or by the words that the published model's name begins with."""
    from fastvideo_grpo.models.registry import FAMILIES

    names = {}
    for folder in sorted(path.parent.name for path in (PACKAGE / "models").glob("*/family.py")):
        words = re.match(r"[A-Za-z]+( [A-Z][a-z]+)*", FAMILIES[folder].name)
        assert words is not None
        called = "|".join(re.sub("[ _]", "[ _.-]?", name) for name in (folder, words[0]))
        # In a class's name it is a word among others.
        joined = words[0].replace(" ", "")
        camel = "|".join(sorted({joined, joined.capitalize()}))
        alone, inside = f"(?<![A-Za-z])(?i:{called})(?![A-Za-z])", f"({camel})(?=[A-Z0-9])|(?<=[A-Za-z])({camel})(?![a-z])"
        names[folder] = re.compile(f"{alone}|{inside}")
    return names


def code_words(file: Path) -> Iterator[str]:
    """Names and texts of a file's code; docstrings and comments are none."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))
        else:
            words = (getattr(node, field, None) for field in ("id", "attr", "name", "arg"))
            yield from (word for word in words if isinstance(word, str))


def who_knows() -> dict[str, list[str]]:
    """File -> models that its code names, without those in whose folder it is."""
    names, found = model_names(), {}
    for file in files():
        name = file.relative_to(PACKAGE).as_posix()
        words = "\n".join(code_words(file))
        known = [model for model, called in names.items() if not name.startswith(f"models/{model}/") and called.search(words)]
        if known:
            found[name] = known
    return found


def names_table() -> str:
    """Who names a model outside its folder, and why."""
    rows = ["| file | names | since it |", "|---|---|---|"]
    for file, models in who_knows().items():
        rows.append(f"| `{file}` | {', '.join(f'`{model}`' for model in models)} | {MAY_KNOW.get(file, '')} |")
    return "\n".join(rows)


def draw_picture(file: Path) -> None:
    """The same as a picture: the rollout above, the update below, the step that both make in between."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    width, height, gap = 2.75, 1.25, 0.3
    figure, axes = pyplot.subplots(figsize=(19, 6.4), dpi=90)
    axes.set_axis_off()
    axes.set_xlim(-0.1, 7 * (width + gap))
    axes.set_ylim(-0.6, 6.6)
    line = {"color": "#44546a", "lw": 1.2}

    def box(column: float, y: float, stop: Stop, colour: str) -> None:
        x = column * (width + gap)
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.03", fc=colour, ec="#44546a", lw=1.2))
        texts = ((1.0, stop.does, {"weight": "bold"}), (0.62, stop.file, {"family": "monospace"}))
        for up, text, font in (*texts, (0.27, ", ".join(stop.names), {"family": "monospace"})):
            axes.text(x + width / 2, y + up, text, ha="center", va="center", fontsize=8.7, **font)
        axes.text(x + width / 2, y - 0.12, stop.leaves, ha="center", va="top", fontsize=8.6, color="#7f3f00")

    def arrow(start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, **line))

    def middle(column: int) -> float:
        return column * (width + gap) + width / 2

    title = {"fontsize": 12, "weight": "bold", "color": "#44546a"}
    for y, stops, colour in ((4.8, ROLLOUT, "#dcebf7"), (0.0, UPDATE, "#fde9d9")):
        for column, stop in enumerate(stops):
            box(column, y, stop, colour)
            if column:
                arrow((column * (width + gap) - gap + 0.03, y + 0.62), (column * (width + gap) - 0.03, y + 0.62))
    for column, stop in enumerate(STEP, start=3):
        box(column, 2.45, stop, "#e5f1dc")
    arrow((middle(3) + width / 2 + 0.03, 3.07), (middle(4) - width / 2 - 0.03, 3.07), "<|-|>")
    arrow((middle(3), 4.25), (middle(3), 3.75), "<|-|>")
    arrow((middle(3), 2.1), (middle(3), 1.35), "<|-|>")
    axes.plot([middle(6), middle(6), middle(0), middle(0)], [4.45, 1.85, 1.85, 1.6], ls=":", **line)
    arrow((middle(0), 1.6), (middle(0), 1.32))
    axes.text(0, 6.25, "rollout: no gradients", **title)
    axes.text(middle(3) - width / 2 - 0.15, 2.95, "the step that both make", ha="right", **title)
    axes.text(middle(0) + 0.2, 1.45, "update: gradients, one timestep at a time", **title)
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


TABLES = {"walk": walk_table, "sizes": sizes_table, "names": names_table, "imports": imports_table}


def written(text: str) -> str:
    """The document with its tables as they are now."""
    for name, table in TABLES.items():
        before, after = f"<!-- {name}: by docs/architecture.py -->\n", f"<!-- end of {name} -->"
        start, end = text.index(before) + len(before), text.index(after)
        text = f"{text[:start]}{table()}\n{text[end:]}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
    draw_picture(PICTURE)
    for circle in (*circles(file_edges()), *circles(part_edges())):
        print(f"they import each other in a circle: {', '.join(circle)}")
