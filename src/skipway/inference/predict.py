"""Prediction with a trained network, loaded from a run folder, a hub folder, or a file of weights."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL import Image
from torch import Tensor, nn

from skipway.checkpoint.files import decode_json, read_safetensors
from skipway.data.batches import Batch, normalize
from skipway.data.decode import MAX_MEGAPIXELS, UnreadableImage
from skipway.data.preprocessing import Preprocessing
from skipway.data.sources.scan import LeftOut, scan_folder
from skipway.errors import CheckpointError, DataError, SkipwayError, printable, spell
from skipway.hardware.device import choose_device
from skipway.inference.code_file import CONFIG, network_file, with_file
from skipway.inference.decoder_folder import find_decoder_folder, load_decoder
from skipway.inference.modes import eval_mode
from skipway.inference.network import build_classifier, is_ours
from skipway.inference.reference_outputs import find_change, refuse_change
from skipway.inference.text_inputs import TextInputs
from skipway.models import find_config
from skipway.models.gpt import GPT
from skipway.weights.formats import file_format
from skipway.weights.hub import local_path
from skipway.zoo import source_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "NetworkChoices",
    "Prediction",
    "Predictor",
    "find_text_inputs",
    "from_pretrained",
    "image_files",
    "weights_file",
]

# weight files of a folder by preference: those that a run chose by validation and tested; its last; the hub's layout
WEIGHT_FILES = ("best.safetensors", "last.safetensors", "model.safetensors")
CODE = ("*.py",)
BATCH_SIZE = 64


class NetworkChoices(TypedDict, total=False):
    """How the network of stored weights is built again, see `from_pretrained`."""

    trust_code: bool
    model: str | None
    allow_changed_outputs: bool


def from_pretrained(
    path: str | Path, *, trust_code: bool = False, model: str | None = None, allow_changed_outputs: bool = False
) -> nn.Module:
    """Load the network of a training run, in evaluation mode, with its `preprocessing`.

    No code from the folder is executed: weights are safetensors, and the network is one of ours or of an installed
    library. A network from a Python file is only built with `trust_code`. What a network that is not ours computes is
    compared with what it computed when the weights were written, on one fixed image.

    Args:
        path: a run folder (its best weights by validation, which were tested); a folder written by
            `skipway export --hub`, or the name of one on the hub, "hf:org/name"; or a file,
            `runs/first/last.safetensors`. A folder or name of transformers with a GPT-2, Llama, Mistral, Qwen2 or Qwen3
            gives a network of the family gpt.
        trust_code: run the Python file that the network was built from: the one in the folder of the weights, if
            there is one, else the one at the path where it was.
        model: what the network is built from instead, "FILE.py:NAME" for a file that was moved.
        allow_changed_outputs: load it although the network computes something else than it did.

    Returns:
        the network on the CPU. `.preprocessing` of a classifier describes its input images and the classes of its
        outputs; `.text` of a language model is its tokenizer and context.

    Raises:
        CheckpointError: the file is missing, damaged, or does not describe its network and preprocessing; or the
            network computes something else than it did.
        MissingExtraError: a hub name is given and huggingface_hub is not installed.

    >>> import skipway as sw
    >>> model = sw.from_pretrained("runs/first")  # doctest: +SKIP
    >>> model.preprocessing.classes  # doctest: +SKIP
    ('cat', 'dog')
    """
    decoder = find_decoder_folder(path)
    if decoder is not None:
        return load_decoder(decoder)
    file = weights_file(path, code=trust_code)
    tensors, header = read_safetensors(file)
    inputs = read_inputs(header, file)
    described = describe_network(decode_json(header["model"].encode(), file), model, file)
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and replaced
        network = build_network(described, inputs, tensors, file, trust_code=trust_code)
    network.load_state_dict(tensors)
    if "reference" in header and not allow_changed_outputs:
        change = find_change(network, described, decode_json(header["reference"].encode(), file))
        refuse_change(change, printable(file), f"{spell('allow_changed_outputs', True)} takes it as it is")
    setattr(network, "text" if isinstance(inputs, TextInputs) else "preprocessing", inputs)
    return network.eval()


def read_inputs(header: Mapping[str, str], file: Path) -> Preprocessing | TextInputs:
    """What a header says about the inputs of its network.

    Raises:
        CheckpointError: nothing, or something damaged.
    """
    if "model" in header and "text" in header:
        return TextInputs.from_json(decode_json(header["text"].encode(), file), printable(file))
    if "model" in header and "preprocessing" in header:
        return Preprocessing.from_json(decode_json(header["preprocessing"].encode(), file), printable(file))
    raise CheckpointError(
        f"{printable(file)} does not describe its network and preprocessing, so it cannot be used for prediction; "
        "use the weights of a run of skipway train, or skipway.load for weights alone"
    )


def find_text_inputs(path: str | Path) -> TextInputs | None:
    """The tokenizer and context stored with weights; None where there are none, as in folders and files of others.

    Raises:
        CheckpointError: there is no such path, or the file is damaged.
    """
    path = local_path(path)
    if path.is_dir() and not any((path / name).is_file() for name in WEIGHT_FILES):
        return None
    file = weights_file(path)
    if file_format(file) != "safetensors":
        return None
    _, header = read_safetensors(file)
    inputs = read_inputs(header, file) if "text" in header else None
    return inputs if isinstance(inputs, TextInputs) else None


def describe_network(stored: Any, given: str | None, file: Path) -> Any:
    """The description in a header, with the name of the network that is to be taken instead.

    The file that makes the network of a hub folder lies beside its weights, so a name without a folder is one there.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("name"), str):
        raise CheckpointError(f"{printable(file)}: the header names no network")
    if given is None:
        own = network_file(stored["name"])
        beside = own is not None and own.name == str(own)
        return {**stored, "name": with_file(stored["name"], file.parent / str(own))} if beside else stored
    if is_ours(stored["name"]) or is_ours(given):
        raise CheckpointError(
            f"{spell('model', given)}: the rule is another place of a network that is not Skipway's own, FILE.py:NAME; "
            f"{printable(file)} has the weights of {printable(stored['name'])}"
        )
    return {**stored, "name": given}


def weights_file(path: str | Path, *, code: bool = False) -> Path:
    """Return the weight file that `from_pretrained` reads; `code` fetches the Python files of a hub name, too.

    Raises:
        CheckpointError: there is none.
    """
    path = local_path(path, (CONFIG, *(CODE if code else ())))
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{printable(path)} does not exist (a name on the Hugging Face hub starts with hf:)")
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{printable(path)} holds no trained network: none of {', '.join(WEIGHT_FILES)}")


def build_network(
    model: dict[str, Any],
    inputs: Preprocessing | TextInputs,
    tensors: dict[str, Tensor],
    file: Path,
    *,
    trust_code: bool = False,
) -> nn.Module:
    """Build the network that a header describes, after checking that the tensors of the file fit it.

    A malicious header could describe a network of any size, so it is first built on the meta device, and refused if it
    has more branches than the file has tensors.
    """
    source = printable(file)
    options = {name: value for name, value in model.items() if name != "name"}
    # a file must not choose device or dtype
    odd = [name for name, value in options.items() if name in ("device", "dtype") or not is_json_value(value)]
    if odd:
        raise CheckpointError(f"{source}: the header has {printable(odd[0])!r}, which is not an option of this network")
    check_head(options.pop("head", None), tensors, source)
    if not is_ours(model["name"]):
        network = build_foreign(model, tensors, source, trust_code)
        check_shape(options, inputs, source)
        return network
    try:
        _, config = find_config(model["name"], options.get("depth"))
        changes = {name: value for name, value in options.items() if name not in ("depth", "scheme")}
        if dataclasses.replace(config, **changes).branches > len(tensors):
            raise CheckpointError(f"{source}: the header describes a network that does not fit the tensors")
        meta = build_classifier({**model, "device": "meta"})
        shapes = {name: tensor.shape for name, tensor in meta.state_dict().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(f"{source}: the tensors do not fit {printable(model['name'])}")
        network = build_classifier(model)
    except CheckpointError:
        raise
    except (SkipwayError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source}: its network cannot be built: {printable(str(error))}") from error
    check_shape(options, inputs, source)
    return network


def build_foreign(model: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, trust_code: bool) -> nn.Module:
    """Build a network of another library, or of a Python file, that a header describes."""
    name = printable(model["name"])
    try:
        runs_code = source_of(model["name"])[0].library is None
        if runs_code and not trust_code:
            raise CheckpointError(
                f"{source}: its network is made by the Python file {name}, which is not run unasked; "
                f"{spell('trust_code', True)} runs it, if you trust it"
            )
        network = build_classifier(model)
    except CheckpointError:
        raise
    except (SkipwayError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: its network {name} cannot be built: {printable(str(error))}") from error
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        raise CheckpointError(f"{source}: the tensors do not fit {name}; it may be of another version")
    return network


def check_head(head: object, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless the hidden layer of a classifier that a header describes is in the tensors of its file."""
    if head is None:
        return
    name, width = head if isinstance(head, list) and len(head) == 2 else ("", 0)
    hidden = tensors.get(f"{name}.0.weight")
    if not isinstance(width, int) or hidden is None or len(hidden) != width:
        raise CheckpointError(f"{source}: the tensors do not fit the hidden layer that the header describes")


def check_shape(options: Mapping[str, Any], inputs: Preprocessing | TextInputs, source: str) -> None:
    """Raise if a network and what is stored about its inputs differ."""
    if isinstance(inputs, TextInputs):
        if options.get("vocab", 0) < inputs.tokenizer.size or options.get("context") != inputs.context:
            raise CheckpointError(f"{source}: vocabulary or context of the network differ from its tokenizer")
    elif options.get("classes") != len(inputs.classes) or options.get("channels") != inputs.channels:
        raise CheckpointError(f"{source}: classes or channels of the network differ from the preprocessing")


def is_json_value(value: object) -> bool:
    """Whether an option is a number, a string, a boolean, None, or a list of these."""
    if isinstance(value, list):
        return all(is_json_value(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class Prediction:
    """The classification of one image.

    Args:
        file: path of the image; empty if it has none.
        label: the most probable class; empty if the image cannot be read.
        probability: probability of that class, 0 to 1; nan if the image cannot be read.
        probabilities: the most probable classes with their probabilities, in descending order.
        error: the reason why the image cannot be read, else empty.
    """

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]
    error: str = ""


Images = Sequence[str | Path] | Sequence[Image.Image] | Image.Image | str | Path | Tensor


class Predictor:
    """A trained network with its preprocessing: images in, class names and probabilities out.

    The network is in evaluation mode while it runs, and in its own mode again afterwards, so that one in training can
    be asked between two steps.

    Args:
        model: a network of `from_pretrained`; it is kept, not copied.
        device: auto, cpu, cuda, cuda:1, to which the network is moved; None leaves it where it is.
        max_megapixels: limit for the pixels of one image, see `skipway.data.DataChoices`.

    Raises:
        SkipwayError: the network has no preprocessing, or the device cannot be used.

    >>> predictor = Predictor.load("runs/first")  # doctest: +SKIP
    >>> predictor.predict(["photo.jpg"])[0].label  # doctest: +SKIP
    'cat'
    """

    def __init__(self, model: nn.Module, *, device: str | None = None, max_megapixels: float = MAX_MEGAPIXELS) -> None:
        preprocessing = getattr(model, "preprocessing", None)
        if isinstance(model, GPT) or isinstance(getattr(model, "text", None), TextInputs):
            raise SkipwayError("a language model takes no images: skipway generate RUN continues a text")
        if not isinstance(preprocessing, Preprocessing):
            raise SkipwayError("the network has no preprocessing: load it with skipway.from_pretrained")
        here = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.device = here if device is None else choose_device(device)
        self.model = model if device is None else model.to(self.device)
        self.preprocessing = preprocessing
        self.max_megapixels = max_megapixels

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        max_megapixels: float = MAX_MEGAPIXELS,
        **network: Unpack[NetworkChoices],
    ) -> Predictor:
        """Load the network with `from_pretrained`, which explains the other choices."""
        return cls(load_channels_last(path, **network), device=device, max_megapixels=max_megapixels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return self.preprocessing.classes

    def predict(
        self,
        images: Images,
        *,
        top: int | None = 5,
        flip: bool | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int = 1,
    ) -> list[Prediction]:
        """Classify images; the predictions are in the order of the images.

        Args:
            images: paths or Pillow images, one or a sequence; or a tensor (N, C, H, W) of the network's input size,
                uint8 or floating point from 0 to 1, not normalised.
            top: number of classes per prediction, the most probable first; None for all.
            flip: average the logits of each image and its mirror image; None for the setting of the run.
            batch_size: images per forward pass.
            workers: threads that decode files while the network computes.

        Raises:
            DataError: a tensor or Pillow image that cannot be used. A file that cannot be read does not raise; the
                reason is in `error` of its prediction.
        """
        if isinstance(images, Tensor):
            batches = (self.preprocessing.of_tensor(part) for part in images.split(batch_size))
            return [prediction for part in batches for prediction in self.classify(part, [""] * len(part), top, flip)]
        given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        files = [each for each in given if not isinstance(each, Image.Image)]
        if odd := [each for each in files if not isinstance(each, str | Path)]:
            raise DataError(
                f"images of {type(odd[0]).__name__}: the rule is paths, Pillow images, or one tensor (N, C, H, W); "
                "PIL.Image.fromarray(array) makes an image of an array uint8 (H, W, C)"
            )
        if len(files) == len(given):
            return list(self.stream(files, top=top, flip=flip, batch_size=batch_size, workers=workers))
        if files:
            raise DataError("paths and Pillow images in one call: give one of the two")
        found: list[Prediction] = []
        for start in range(0, len(given), batch_size):
            part = given[start : start + batch_size]
            pixels = torch.stack([self.preprocessing.of_picture(each) for each in part])  # type: ignore[arg-type]
            found += self.classify(
                self.normalize(pixels), [str(getattr(each, "filename", "")) for each in part], top, flip
            )
        return found

    def stream(
        self,
        files: Sequence[str | Path],
        *,
        top: int | None = 5,
        flip: bool | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int = 1,
    ) -> Iterator[Prediction]:
        """Yield the predictions for files one by one, reading ahead by one batch."""
        for numbers, inputs, failures in self.read_batches(files, batch_size, workers):
            names = [str(files[number]) for number in numbers]
            predictions = dict(zip(numbers, self.classify(inputs, names, top, flip), strict=True))
            for number, reason in failures:
                predictions[number] = Prediction(str(files[number]), "", float("nan"), {}, reason)
            yield from (predictions[number] for number in sorted(predictions))

    def batches(
        self,
        files: Sequence[str | Path],
        labels: Tensor,
        *,
        batch_size: int = BATCH_SIZE,
        workers: int = 1,
        opened: Callable[[str], Path | bytes] = Path,
        failed: Callable[[str, str], object] = lambda file, reason: None,
    ) -> Iterator[Batch]:
        """Yield files with their class indices as batches for `evaluate`.

        Args:
            labels: int64 class indices, one per file.
            opened: maps a file name to its path or content.
            failed: called with each file that cannot be read, and the reason.
        """
        for numbers, inputs, failures in self.read_batches(files, batch_size, workers, opened):
            for number, reason in failures:
                failed(str(files[number]), reason)
            chosen = torch.tensor(numbers, dtype=torch.int64)
            own = labels[chosen].to(self.device)
            if numbers:
                yield Batch(inputs, own, own, chosen)

    def read_batches(
        self,
        files: Sequence[str | Path],
        batch_size: int,
        workers: int,
        opened: Callable[[str], Path | bytes] = Path,
    ) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Yield per batch the indices of readable files, their inputs, and the unreadable ones with the reason.

        Threads decode the next batch meanwhile: Pillow releases the GIL.
        """
        parts = [range(len(files))[start : start + batch_size] for start in range(0, len(files), batch_size)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            ahead = deque[list[Future[Tensor | str]]]()
            for number, part in enumerate(parts):
                for later in parts[number + len(ahead) : number + 2]:
                    ahead.append([pool.submit(self.decode, str(files[place]), opened) for place in later])
                read = [(place, decoding.result()) for place, decoding in zip(part, ahead.popleft(), strict=True)]
                images = [(place, found) for place, found in read if isinstance(found, Tensor)]
                failures = [(place, found) for place, found in read if isinstance(found, str)]
                stack = torch.stack([image for _, image in images]) if images else None
                inputs = self.preprocessing.example[:0] if stack is None else self.normalize(stack)
                yield [place for place, _ in images], inputs, failures

    def decode(self, file: str, opened: Callable[[str], Path | bytes]) -> Tensor | str:
        """Decode a file; return its pixels, or the reason why it cannot be read."""
        try:
            return self.preprocessing.of_file(opened(file), max_megapixels=self.max_megapixels, name=Path(file))
        except UnreadableImage as error:
            return error.reason

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 (N, H, W, C) to normalised inputs (N, C, H, W) on the device."""
        return normalize(images.to(self.device), self.preprocessing.mean, self.preprocessing.std)

    @torch.inference_mode()
    def classify(self, inputs: Tensor, files: Sequence[str], top: int | None, flip: bool | None) -> list[Prediction]:
        """Run the network on inputs and return one prediction each."""
        if not len(inputs):
            return []
        inputs = inputs.to(self.device)
        with eval_mode(self.model):
            logits = self.model(inputs).float()
            if self.preprocessing.flip_test if flip is None else flip:
                logits = (logits + self.model(inputs.flip(-1)).float()) / 2
        probabilities, indices = logits.softmax(1).topk(min(top or len(self.classes), len(self.classes)))
        found = []
        for file, own, order in zip(files, probabilities.tolist(), indices.tolist(), strict=True):
            named = {self.classes[index]: probability for index, probability in zip(order, own, strict=True)}
            found.append(Prediction(file, self.classes[order[0]], own[0], named))
        return found


def load_channels_last(path: str | Path, **network: Unpack[NetworkChoices]) -> nn.Module:
    """The network of `from_pretrained`, with its weights in the layout in which images arrive."""
    return from_pretrained(path, **network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def image_files(paths: Iterable[Path], *, outside: bool = False) -> tuple[list[Path], LeftOut]:
    """Expand folders to the images inside, found as for training, sorted and recursive.

    Args:
        paths: files, which are taken as they are, and folders.
        outside: follow links that lead out of a folder.

    Returns:
        the files, and those below the folders that are left out, with reasons.

    Raises:
        DataError: a path does not exist, or a folder contains no image.
    """
    found: list[Path] = []
    left_out = LeftOut()
    for path in paths:
        if path.is_dir():
            try:
                folder, others = scan_folder(path, outside=outside)
            except OSError as error:
                raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
            if not (below := folder.below()):
                raise DataError("; ".join([f"{printable(path)} contains no images", *others.sentences()]))
            found += [path / name for name in below]
            for reason, count in others.counts.items():
                left_out.add(reason, str(path / others.first[reason]), count)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{printable(path)} does not exist")
    return found, left_out
