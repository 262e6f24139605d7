"""What the Tab key offers after `mathmind`: names of what is here."""

from collections.abc import Callable, Iterable
from pathlib import Path

from click import Context, Parameter

from stages.host import models


def _offers(names: Callable[[Path, Context], Iterable[str]]) -> Callable[[Context, Parameter, str], list[str]]:
    """As click asks for it: those of the names that begin as what has been typed."""

    def complete(context: Context, parameter: Parameter, typed: str) -> list[str]:
        if not Path("dvc.yaml").is_file():
            return []
        return [name for name in names(Path.cwd(), context) if name.startswith(typed)]

    return complete


@_offers
def model(folder: Path, context: Context) -> Iterable[str]:
    """Models that are here, but for one that is named already."""
    return [name for name in models.models_here(folder) if name != _named(context)]


@_offers
def form(folder: Path, context: Context) -> Iterable[str]:
    """GGUF forms of the model that is named, or of any."""
    named = _named(context)
    return sorted({form for name in ([named] if named else models.MODELS) for form in models.forms_here(folder, name)})


def _named(context: Context) -> str | None:
    """The command line's MODEL, which click leaves among the words not yet understood where an option lacks its value."""
    return context.params.get("model") or next((word for word in context.args if word in models.MODELS), None)


@_offers
def stage(folder: Path, context: Context) -> Iterable[str]:
    """Stages as dvc.yaml names them, such as merge@grpo."""
    from stages.host.graph import read_graph, read_yaml

    return read_graph(folder, read_yaml(folder / "params.yaml"))


@_offers
def joined_stage(folder: Path, context: Context) -> Iterable[str]:
    """Stages that several machines train together."""
    from stages.host.engines import TOGETHER

    return TOGETHER


@_offers
def seeded_stage(folder: Path, context: Context) -> Iterable[str]:
    """Stages with a seed of their own that are not named yet."""
    from stages.host.seeds import SEEDED

    return [name for name in SEEDED if name not in (context.params.get("stages") or ())]


@_offers
def out(folder: Path, context: Context) -> Iterable[str]:
    """Outs that dvc.lock holds."""
    from stages.host.graph import lock_outs, lock_stages

    return sorted(lock_outs(lock_stages(folder)))


@_offers
def source(folder: Path, context: Context) -> Iterable[str]:
    """Hub sources of params.yaml."""
    from stages.host.graph import read_yaml

    params = read_yaml(folder / "params.yaml")
    named = {**params["fetch"]["sources"], "base-model": params["base_model"]}
    return [name for name, source in named.items() if source["kind"] == "hub"]
