"""Models by name: Skipway's own, timm, torchvision, transformers or a Python file.

Each source is a row of `SOURCES`: what it looks like, which options it takes, how it loads. This file imports torch,
so commands import it when they run.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, first_line, printable, similar_names, suggest
from skipway.hardware.limits import available_memory
from skipway.install_lines import library_line
from skipway.models.family import build, find_config, resolve
from skipway.zoo.random_inputs import RandomInput, find_inputs

__all__ = [
    "FIRST_LAYER",
    "SOURCES",
    "LoadedModel",
    "ModelRequest",
    "Source",
    "config_file",
    "depth_argument",
    "import_library",
    "input_shape_of",
    "load_model",
    "source_of",
]

Shape = tuple[int, ...]

IMAGE: Shape = (3, 224, 224)
SMALL_SIDE = 32
TOKENS = 64
COMPILED_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Options of a model requested by name; None leaves the choice to its source.

    Args:
        depth: weight layers of a family; of a file's function the argument that takes its depth.
        scheme: spec string of the residual scheme.
        classes: outputs.
        shape: of one sample.
        needed_classes: outputs, for functions and classes that have to be given their number.
    """

    depth: int | None = None
    scheme: str | None = None
    classes: int | None = None
    shape: Shape | None = None
    needed_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and what it is called with.

    Args:
        model: with fresh weights.
        shape: of one sample.
        vocabulary: samples are whole numbers below it; None: they are real numbers.
        argument: name of the argument that takes the samples; None: the first.
        labels: the samples are their own labels, for language models, which then put out a loss.
        others: further arguments.
        batch: inputs, or (inputs, targets), that the source brought along.
        remarks: sentences about how it was made.
        guessed: whether the shape of a sample is a guess from the first layer.
    """

    model: nn.Module
    shape: Shape
    vocabulary: int | None = None
    argument: str | None = None
    labels: bool = False
    others: tuple[RandomInput, ...] = ()
    batch: Any = None
    remarks: tuple[str, ...] = ()
    guessed: bool = False

    def call_with(self, samples: Tensor) -> Any:
        """Samples as the model takes them."""
        if self.argument is None:
            return samples
        others = {each.name: each.draw(len(samples)) for each in self.others}
        return {self.argument: samples, **others, **({"labels": samples} if self.labels else {})}

    def random(self, count: int) -> Any:
        """That many random samples: standard normal numbers, or tokens."""
        if self.vocabulary is not None:
            return self.call_with(torch.randint(self.vocabulary, (count, *self.shape)))
        return self.call_with(torch.randn(count, *self.shape))


@dataclass(frozen=True)
class Source:
    """One kind of place that models come from.

    Args:
        form: how it is written, for messages.
        pattern: regular expression of the whole text; its group "name" goes to `load`.
        load: makes the model.
        takes: the fields of `ModelRequest`, `shape` aside, that it can follow.
        refusal: what to do instead where it cannot.
        library: name of the library, "skipway" for ours; None for a file of Python code.
    """

    form: str
    pattern: str
    load: Callable[[str, ModelRequest], LoadedModel]
    takes: frozenset[str] = frozenset()
    refusal: str = ""
    library: str | None = None


def source_of(text: str) -> tuple[Source, str]:
    """The source that a text on the command line names, and the name in it.

    >>> source_of("timm:resnet18")[1], source_of("resnet110")[1], source_of("nets/mine.py:make")[1]
    ('resnet18', 'resnet110', 'nets/mine.py:make')
    >>> source_of("tim:resnet18")
    Traceback (most recent call last):
    skipway.errors.SkipwayError: unknown source of models 'tim'; did you mean 'timm'?
    """
    for source in SOURCES:
        match = re.fullmatch(source.pattern, text)
        if match:
            return source, match["name"]
    prefixes = [source.form.partition(":")[0] for source in SOURCES if ":" in source.form]
    raise SkipwayError(suggest("source of models", text.partition(":")[0], prefixes))


def load_model(text: str, wanted: ModelRequest) -> LoadedModel:
    """The model that a text on the command line names.

    Args:
        text: see `SOURCES`.
        wanted: what is asked of it.

    Raises:
        SkipwayError: no such model, an option that its source does not take, a library that is not installed.
    """
    source, name = source_of(text)
    for option in ("depth", "scheme", "classes"):
        if getattr(wanted, option) is not None and option not in source.takes:
            raise SkipwayError(
                f"--{option} {getattr(wanted, option)}: {source.form} does not take it; {source.refusal}"
            )
    loaded = source.load(name, wanted)
    return loaded if wanted.shape is None else replace(loaded, shape=wanted.shape)


def load_ours(name: str, wanted: ModelRequest) -> LoadedModel:
    """A network of Skipway's own, at its own image size or at the one that is asked for."""
    asked = {"depth": wanted.depth, "scheme": wanted.scheme}
    ours, options = resolve(name, {key: value for key, value in asked.items() if value is not None})
    _, config = find_config(ours, options.get("depth"))
    known = {field.name for field in fields(config)}
    if wanted.classes is not None and "classes" not in known:
        raise SkipwayError(
            f"{ours}: the network takes tokens and has no classes; --batch is a text file, without --classes"
        )
    options |= {} if wanted.classes is None else {"classes": wanted.classes}
    if wanted.shape is not None and len(wanted.shape) == 3:
        fitting = {"channels": wanted.shape[0], "image": wanted.shape[-1]}
        options |= {key: value for key, value in fitting.items() if key in known and value != getattr(config, key)}
    model = build(ours, **options)
    return LoadedModel(model=model, shape=input_shape_of(model), vocabulary=getattr(model.config, "vocab", None))


def load_timm(name: str, wanted: ModelRequest) -> LoadedModel:
    """A model of timm."""
    timm = import_library("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise SkipwayError(suggest("model of timm", name, timm.list_models()))
    options: dict[str, Any] = {} if wanted.classes is None else {"num_classes": wanted.classes}
    if wanted.shape is not None:
        options["in_chans"] = wanted.shape[0]
        if timm.create_model(name).default_cfg.get("fixed_input_size"):
            options["img_size"] = wanted.shape[1:]
    model = timm.create_model(name, **options)
    return LoadedModel(model=model, shape=input_shape_of(model))


def load_torchvision(name: str, wanted: ModelRequest) -> LoadedModel:
    """A model of torchvision."""
    models = import_library("torchvision", f"torchvision:{name}").models
    if name not in models.list_models():
        raise SkipwayError(suggest("model of torchvision", name, models.list_models()))
    options: dict[str, Any] = {} if wanted.classes is None else {"num_classes": wanted.classes}
    if wanted.shape is not None and name.startswith("vit_"):  # the others take images of any size
        options["image_size"] = wanted.shape[-1]
    transforms = getattr(models.get_model_weights(name).DEFAULT, "transforms", None)
    size = getattr(transforms, "keywords", {}).get("crop_size", IMAGE[-1])
    return LoadedModel(model=models.get_model(name, weights=None, **options), shape=(3, size, size))


def load_transformers(name: str, wanted: ModelRequest) -> LoadedModel:
    """A class of Hugging Face transformers, with its default config or that of a folder, and inputs that it runs on."""
    options: dict[str, Any] = {} if wanted.classes is None else {"num_labels": wanted.classes}
    if wanted.shape is not None and len(wanted.shape) == 3:
        options |= {"image_size": wanted.shape[-1], "num_channels": wanted.shape[0]}
    made, config = transformers_config(name)
    try:
        for key, value in options.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
        refuse_too_large(name, made, config)
        model = made(config)
        main, *others = find_inputs(model, wanted.shape)
    except Exception as error:  # a class that needs a config, weights or inputs of its own raises anything
        text = " ".join(str(error).split())
        raise SkipwayError(
            f"hf:{name} does not run with its config and random inputs ({text:.200}); give a file with a "
            "function that returns (model, inputs): FILE.py:NAME"
        ) from error
    labels = any(each.name == "labels" for each in others) and main.name == "input_ids"
    return LoadedModel(
        model=model,
        shape=main.shape,
        vocabulary=main.vocabulary,
        argument=main.name,
        labels=labels,
        others=tuple(each for each in others if not (labels and each.name == "labels")),
    )


def transformers_config(name: str) -> tuple[Any, Any]:
    """A class of transformers, and its default config, or that of a folder or file, which names its class.

    Raises:
        SkipwayError: there is none.
    """
    transformers = import_library("transformers", f"hf:{name}")
    file = config_file(name)
    if file is None:
        made: Any = getattr(transformers, name, None)
        if getattr(made, "config_class", None) is None:
            known = [each for each in dir(transformers) if each.endswith("Model") or "For" in each]
            raise SkipwayError(suggest("model class of transformers", name, known))
        return made, made.config_class()
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        names = config.architectures or [transformers.AutoModelForImageClassification._model_mapping[type(config)]]
    except Exception as error:  # whatever transformers raises on a file that it does not know
        raise SkipwayError(
            f"hf:{name}: {printable(file)} is no config of transformers: {printable(first_line(error))}; give a folder "
            "that save_pretrained wrote, or a class"
        ) from error
    made = names[0] if isinstance(names[0], type) else getattr(transformers, names[0], None)
    if made is None:
        raise SkipwayError(
            f"hf:{name}: transformers {transformers.__version__} has no class {printable(str(names[0]))}"
        )
    return made, config


def config_file(name: str) -> Path | None:
    """The config in a name of transformers that is a path, of a folder or of the file itself; None for a class."""
    path = Path(name)
    if path.name == name and path.suffix != ".json" and not path.is_dir():
        return None
    return path / "config.json" if path.is_dir() or path.suffix != ".json" else path


def refuse_too_large(name: str, made: Any, config: Any) -> None:
    """Refuse a network whose weights, with the copies that an analysis makes, do not fit into memory."""
    with torch.device("meta"):
        count = sum(each.numel() for each in made(config).parameters())
    free, needed = available_memory(), 4 * 4 * count
    if free is not None and needed > free:
        raise SkipwayError(
            f"{count / 1e9:.2g} billion parameters need {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free; "
            "build a network with fewer layers"
        )


def load_file(name: str, wanted: ModelRequest) -> LoadedModel:
    """Load a model from a Python file: the name of a module object, of its class, or of a function that returns one.

    The function may also give (model, inputs) or (model, (inputs, targets)). The file's folder is on the path of
    imports while it runs.
    """
    file, _, attribute = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    path = Path(file)
    if not path.is_file():
        raise SkipwayError(
            f"{path}: no such file{similar_names(path) or '; a model of your own is given as FILE.py:NAME'}"
        )
    with import_path(path):
        module = import_file(path)
        if not attribute:
            offered = ", ".join(f"{path}:{each}" for each in model_factories(module)) or "nothing that makes a model"
            raise SkipwayError(
                f"{path}: name the class or function that makes the model, as in FILE.py:NAME; the file has {offered}"
            )
        if not hasattr(module, attribute):
            raise SkipwayError(f"{path}: {suggest('name', attribute, model_factories(module) or vars(module))}")
        made, remarks = call_factory(getattr(module, attribute), name, wanted)
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SkipwayError(
            f"{name} gives a {type(model).__name__}; it has to give a torch.nn.Module, or (model, batch)"
        )
    first = next(parameter_owners(model), None)
    vocabulary = first.num_embeddings if isinstance(first, nn.Embedding) else None
    stated = described_input(model) is not None or isinstance(first, nn.Embedding | nn.Linear)
    return LoadedModel(
        model=model,
        shape=input_shape_of(model),
        vocabulary=vocabulary,
        batch=batch,
        remarks=remarks,
        guessed=batch is None and not stated,
    )


class UncachedLoader(SourceFileLoader):
    """Compiles a source file as it is now.

    Python's cache takes a file that was changed within a second to the same number of bytes for the old one, and leaves
    a folder beside the file.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def import_file(path: Path) -> ModuleType:
    """A Python file as a module, under a name of its own: pickle finds classes by it, in two files of one name, too."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"skipway_source_{path.stem}_{digest}"
    loader = UncachedLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    if spec is None:
        raise SkipwayError(f"{path}: not a Python file")
    module = module_from_spec(spec)
    # classes look their module up by name, dataclasses for one
    sys.modules[name] = module
    with translate_errors(path):
        loader.exec_module(module)
    return module


@contextmanager
def import_path(path: Path) -> Iterator[None]:
    """Within it a file can import its neighbours, and not others of the same names; behind it, a name that can be
    imported without them means what it meant before. Neighbours of other names stay loaded, for pickle and for imports
    while the network runs.
    """
    folder, kept = path.resolve().parent, list(sys.path)
    before = top_names()
    hidden = {name for name in offered_names(folder) if is_hidden(name, folder)}
    others = unloaded(hidden)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = kept
        new = offered_names(folder) - before
        unloaded(hidden | {name for name in new if not is_loaded_from(PathFinder.find_spec(name, kept), name)})
        sys.modules.update(others)


def unloaded(names: Collection[str]) -> dict[str, ModuleType]:
    """Take modules, with what is below them, from those that are loaded, and return them."""
    taken = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in taken}


def top_names() -> set[str]:
    """The names of what is loaded, without what is below it."""
    return {name.partition(".")[0] for name in sys.modules}


def offered_names(folder: Path) -> set[str]:
    """Names of what is loaded that are names in a folder, too."""
    names = top_names() - sys.stdlib_module_names - {"__main__", "skipway"}
    return {name for name in names if (folder / f"{name}.py").is_file() or (folder / name).is_dir()}


def is_hidden(name: str, folder: Path) -> bool:
    """Whether an import with a folder in front of the path would take a name from there, and it is loaded from
    elsewhere.

    Those of installed packages stay loaded: their compiled halves cannot be loaded twice.
    """
    spec = PathFinder.find_spec(name, [str(folder), *sys.path])
    here = any(folder in place.parents for place in places_of(spec))
    installed = any({"site-packages", "dist-packages"} & set(file.parts) for file in loaded_files(name))
    return here and not installed and not is_loaded_from(spec, name)


def is_loaded_from(spec: ModuleSpec | None, name: str) -> bool:
    """Whether all that is loaded under a name is from where an import would take it; True where it would find none."""
    places = places_of(spec)
    return not places or all(any(each in (file, *file.parents) for each in places) for file in loaded_files(name))


def places_of(spec: ModuleSpec | None) -> list[Path]:
    """The file of a module, or that of a package and its folders."""
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return [Path(place).resolve() for place in places if place]


def loaded_files(name: str) -> list[Path]:
    """The files of a module that is loaded, and of what is below it."""
    modules = [module for key, module in list(sys.modules.items()) if key.partition(".")[0] == name]
    return [Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None)) is not None]


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Errors raised in the user's file are reported with their line."""
    try:
        yield
    except SkipwayError:
        raise
    except (Exception, SystemExit) as error:  # a script may end the process
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise SkipwayError(f"{place}: {type(error).__name__}: {error}") from error


def model_factories(module: ModuleType) -> list[str]:
    """The names in a file that a model can be made by, functions first."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    here = {name: value for name, value in own.items() if getattr(value, "__module__", "") == module.__name__}
    kinds = (
        [name for name, value in here.items() if callable(value) and not isinstance(value, type | nn.Module)],
        [name for name, value in here.items() if isinstance(value, type) and issubclass(value, nn.Module)],
        [name for name, value in own.items() if isinstance(value, nn.Module)],
    )
    return [name for kind in kinds for name in kind]


def call_factory(value: Any, name: str, wanted: ModelRequest) -> tuple[Any, tuple[str, ...]]:
    """The value itself where it is a module, else what it gives when it is called, and remarks about that.

    An argument without a default that is named like the number of classes is given it, and the one that takes the depth
    is given the depth that is asked for.
    """
    if isinstance(value, nn.Module) or not callable(value):
        if wanted.depth is not None:
            raise SkipwayError(f"{name} is a module, whose depth is fixed; give a function def make(depth): …")
        return value, ()
    needed = needed_arguments(value)
    count = wanted.needed_classes
    given = {each: count for each in needed if each in CLASS_ARGUMENTS} if count is not None else {}
    if wanted.depth is not None:
        given |= {depth_argument(value, name): wanted.depth}
    if missing := [each for each in needed if each not in given]:
        raise SkipwayError(
            f"{name} needs arguments: {', '.join(missing)}; give a function without any, "
            f"def make(): return {value.__name__}(…)"
        )
    with translate_errors(Path(name.rpartition(":")[0])):
        return value(**given), tuple(f"{name} is called with {key}={each}" for key, each in given.items())


def needed_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments without a default."""
    parameters = inspect.signature(function).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in several]


def depth_argument(function: Callable[..., Any], name: str) -> str:
    """The argument of a function that takes the depth of the network it makes: the one that is named so, else the only
    one that has to be given, else the only one.

    Raises:
        SkipwayError: there is none.

    >>> depth_argument(lambda width=8, layers=2: None, "make"), depth_argument(lambda n: None, "make")
    ('layers', 'n')
    """
    names = list(inspect.signature(function).parameters)
    needed = [each for each in needed_arguments(function) if each not in CLASS_ARGUMENTS]
    found = [each for each in names if each in DEPTH_ARGUMENTS]
    for choice in (found, needed, names):
        if len(choice) == 1:
            return choice[0]
    takes = f"takes {', '.join(names)}" if names else "takes no argument"
    raise SkipwayError(f"{name} {takes}, and none of them is known to be the depth; give a function def make(depth): …")


# names of the argument that takes the depth
DEPTH_ARGUMENTS = frozenset(
    {"depth", "blocks", "layers", "n_blocks", "n_layer", "n_layers", "num_blocks", "num_layers", "num_hidden_layers"}
)


# names of the argument that takes the number of classes
CLASS_ARGUMENTS = frozenset(
    {"classes", "n_classes", "num_classes", "nb_classes", "nclasses", "number_of_classes"}
    | {"num_labels", "n_labels", "num_outputs", "out_features"}
)


def parameter_owners(model: nn.Module) -> Iterator[Any]:
    """The modules with parameters of their own, in the order of their registration."""
    return (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)


# what the first layer of a model takes, by its type
FIRST_LAYER: dict[type[nn.Module], Callable[[Any], Shape]] = {
    nn.Conv1d: lambda layer: (layer.in_channels, IMAGE[-1]),
    nn.Conv2d: lambda layer: (layer.in_channels, *IMAGE[1:]),
    nn.Linear: lambda layer: (layer.in_features,),
    nn.Embedding: lambda layer: (TOKENS,),
}


def described_input(model: nn.Module) -> Shape | None:
    """The shape of one sample as a model of timm's, or of ours, says; None where it says nothing."""
    described = getattr(model, "default_cfg", None)
    if isinstance(described, dict) and "input_size" in described:
        return tuple(described["input_size"])
    config: Any = getattr(model, "config", None)
    if hasattr(config, "channels"):
        side = (
            SMALL_SIDE if getattr(config, "stem", None) in ("cifar", "patch") else getattr(config, "image", IMAGE[-1])
        )
        return (config.channels, side, side)
    return (config.context,) if hasattr(config, "context") else None


def input_shape_of(model: nn.Module) -> Shape:
    """The shape of one sample: as the model says, else as its first layer lets guess.

    >>> input_shape_of(nn.Sequential(nn.Linear(5, 2))), input_shape_of(nn.Sequential(nn.Conv2d(1, 2, 3)))
    ((5,), (1, 224, 224))
    """
    if (described := described_input(model)) is not None:
        return described
    first = next(parameter_owners(model), None)
    guess = next((guess for kind, guess in FIRST_LAYER.items() if isinstance(first, kind)), None)
    return IMAGE if guess is None else guess(first)


def import_library(package: str, purpose: str = "this") -> ModuleType:
    """Import timm, torchvision or transformers, also beside a torchvision whose compiled half does not fit this torch.

    Raises:
        SkipwayError: the library is not installed; says how to install it.
    """
    if find_spec(package) is None:
        raise SkipwayError(f"{purpose} needs {package}, which is not installed: {library_line(package)}")
    if find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        import_declaring("torchvision", COMPILED_OPERATORS)
    return importlib.import_module(package)


def import_declaring(package: str, schemas: Mapping[str, str]) -> ModuleType:
    """Import a package that registers shape functions for operators of its compiled half.

    Where that half does not load, the operators are declared and the package is imported once more. They are never
    declared before it is tried: defining an operator a second time would end the process.
    """
    try:
        return importlib.import_module(package)
    except RuntimeError:
        missing = [schema for name, schema in schemas.items() if not hasattr(getattr(torch.ops, package), name)]
        if not missing:
            raise
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    declared = FRAGMENTS.setdefault(package, torch.library.Library(package, "FRAGMENT"))
    for schema in missing:
        declared.define(schema)
    return importlib.import_module(package)


# a definition lives as long as the object that made it
FRAGMENTS: dict[str, torch.library.Library] = {}

OTHERS = "use it with a Skipway model, or build the model in a file: FILE.py:NAME"
CLASSES = frozenset({"classes"})
SOURCES: tuple[Source, ...] = (
    Source("timm:NAME", r"timm:(?P<name>.+)", load_timm, CLASSES, OTHERS, "timm"),
    Source("torchvision:NAME", r"torchvision:(?P<name>.+)", load_torchvision, CLASSES, OTHERS, "torchvision"),
    Source(
        "hf:CLASS or hf:FOLDER", r"(?:hf|transformers):(?P<name>.+)", load_transformers, CLASSES, OTHERS, "huggingface"
    ),
    Source("FILE.py:NAME", r"(?P<name>.+\.py(?::\w*)?)", load_file, frozenset({"depth"}), "set it in the file"),
    Source("a Skipway model", r"(?P<name>[^:]+)", load_ours, CLASSES | {"depth", "scheme"}, library="skipway"),
)
