"""A trained network, loaded to be used: from a run folder, a folder for the hub, or one file of weights."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from skipway.checkpoint.files import decode_json, read_safetensors
from skipway.data.batches import Batch, normalised
from skipway.data.decode import UnreadableImage
from skipway.data.preprocessing import Preprocessing
from skipway.data.sources.index import SUFFIXES
from skipway.data.split import printable
from skipway.errors import CheckpointError, DataError, SkipwayError
from skipway.hardware.device import choose_device
from skipway.models import build, find_config
from skipway.weights.hub import PREFIX, download

__all__ = ["Prediction", "Predictor", "from_pretrained", "image_files", "weights_file"]

# the weights of a folder: those that a run chose by validation and tested, else its last, else the hub's layout
NAMES = ("best.safetensors", "last.safetensors", "model.safetensors")
BATCH = 64


def from_pretrained(path: str | Path) -> nn.Module:
    """The network that a training run left behind, in evaluation mode, with its `preprocessing`.

    Nothing that the folder holds is run: weights are safetensors, and the network is one that `build` knows.

    Args:
        path: a run folder (the weights that it chose by validation and tested); a folder that `skipway export --hub`
            made, or the name of one on the hub, "hf:org/name"; or a file, `runs/first/last.safetensors`.

    Returns:
        the network on the CPU; `.preprocessing` says what images it takes and what its outputs mean.

    Raises:
        CheckpointError: no such file, a damaged one, or one that does not tell its network and preprocessing.
        MissingExtraError: a name on the hub without huggingface_hub.

    >>> import skipway as sw
    >>> model = sw.from_pretrained("runs/first")  # doctest: +SKIP
    >>> model.preprocessing.classes  # doctest: +SKIP
    ('cat', 'dog')
    """
    file = weights_file(path)
    tensors, header = read_safetensors(file)
    if not {"model", "preprocessing"} <= header.keys():
        raise CheckpointError(
            f"{printable(file)} does not say which network it is for and how images are prepared, so nothing can be "
            "predicted with it; take the weights of a run of skipway train, or skipway.load for weights alone"
        )
    model = decode_json(header["model"].encode(), file)
    preprocessing = Preprocessing.from_json(decode_json(header["preprocessing"].encode(), file), printable(file))
    network = fitting_network(model, preprocessing, tensors, file)
    network.load_state_dict(tensors)
    network.preprocessing = preprocessing  # type: ignore[assignment]
    return network.eval()


def weights_file(path: str | Path) -> Path:
    """The weights that `from_pretrained` reads.

    Raises:
        CheckpointError: there are none.
    """
    if isinstance(path, str) and path.startswith(PREFIX):
        path = download(path)
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{printable(path)} does not exist (a name on the Hugging Face hub begins with hf:)")
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{printable(path)} holds no trained network: none of {', '.join(NAMES)}")


def fitting_network(model: object, preprocessing: Preprocessing, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """The network of a header, after checking that it is the one whose weights the file holds.

    A header can ask for any size; so the network is made without memory first, and none with more connections than
    the file has tensors.
    """
    source = printable(file)
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise CheckpointError(f"{source}: the header names no network")
    options = {name: value for name, value in model.items() if name != "name"}
    # where and in which type the network is made is not the file's to say
    odd = [name for name, value in options.items() if name in ("device", "dtype") or not plain(value)]
    if odd:
        raise CheckpointError(f"{source}: the header gives an option {printable(odd[0])!r}, which a network has not")
    try:
        _, config = find_config(model["name"], options.get("depth"))
        changes = {name: value for name, value in options.items() if name not in ("depth", "scheme")}
        if dataclasses.replace(config, **changes).branches > len(tensors):
            raise CheckpointError(f"{source}: the header speaks of another network than the file holds")
        shapes = {name: tensor.shape for name, tensor in build(**model, device="meta").state_dict().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(f"{source}: the tensors are not those of a {printable(model['name'])}")
        network = build(**model)
    except CheckpointError:
        raise
    except (SkipwayError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source}: its network cannot be built: {printable(str(error))}") from error
    if options.get("classes") != len(preprocessing.classes) or options.get("channels") != preprocessing.channels:
        raise CheckpointError(f"{source}: the network has other classes or channels than the preprocessing")
    return network


def plain(value: object) -> bool:
    """Whether an option is a number, a text, a truth value, none, or a list of these."""
    if isinstance(value, list):
        return all(plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class Prediction:
    """What a network takes one image for.

    Args:
        file: its path, empty for an image that came without.
        label: the class with the largest probability; empty where the image cannot be read.
        probability: of that class, 0 to 1; nan where the image cannot be read.
        probabilities: of the most probable classes, in falling order.
        error: why the image cannot be read, else empty.
    """

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]
    error: str = ""


Images = Sequence[str | Path] | Sequence[Image.Image] | Image.Image | str | Path | Tensor


class Predictor:
    """A trained network with its preprocessing: images in, class names and probabilities out.

    Args:
        model: a network of `from_pretrained`.
        device: where it computes, see `skipway train --device`.

    Raises:
        SkipwayError: the network has no preprocessing, or there is no such device.

    >>> predictor = Predictor.load("runs/first")  # doctest: +SKIP
    >>> predictor.predict(["photo.jpg"])[0].label  # doctest: +SKIP
    'cat'
    """

    def __init__(self, model: nn.Module, *, device: str = "cpu") -> None:
        preprocessing = getattr(model, "preprocessing", None)
        if not isinstance(preprocessing, Preprocessing):
            raise SkipwayError("the network has no preprocessing: take one of skipway.from_pretrained")
        self.device = choose_device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.preprocessing = preprocessing

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> Predictor:
        """Of what `from_pretrained` reads."""
        return cls(from_pretrained(path), device=device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the outputs."""
        return self.preprocessing.classes

    def predict(
        self, images: Images, *, top: int | None = 5, flip: bool = False, batch_size: int = BATCH, workers: int = 1
    ) -> list[Prediction]:
        """What the images show, in their order.

        Args:
            images: paths of files, images of Pillow, or one of either; or a tensor (N, C, H, W) of the input's size,
                uint8 or floating point from 0 to 1, not normalised.
            top: how many classes are told, the most probable ones; None tells all.
            flip: see each image and its mirror image, and take the mean of the logits.
            batch_size: images that go through the network at a time.
            workers: threads that decode files while the network computes.

        Raises:
            DataError: a tensor or an image of Pillow that cannot be used. A file that cannot be read is no reason to
                stop: its prediction says why in `error`.
        """
        if isinstance(images, Tensor):
            batches = (self.preprocessing.of_tensor(part) for part in images.split(batch_size))
            return [told for part in batches for told in self.told(part, [""] * len(part), top, flip)]
        given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        files = [each for each in given if not isinstance(each, Image.Image)]
        if len(files) == len(given):
            return list(self.stream(files, top=top, flip=flip, batch_size=batch_size, workers=workers))
        if files:
            raise DataError("files and images of Pillow in one call: give one of the two")
        found: list[Prediction] = []
        for start in range(0, len(given), batch_size):
            part = given[start : start + batch_size]
            pixels = torch.stack([self.preprocessing.of_picture(each) for each in part])  # type: ignore[arg-type]
            found += self.told(
                self.normalised(pixels), [str(getattr(each, "filename", "")) for each in part], top, flip
            )
        return found

    def stream(
        self,
        files: Sequence[str | Path],
        *,
        top: int | None = 5,
        flip: bool = False,
        batch_size: int = BATCH,
        workers: int = 1,
    ) -> Iterator[Prediction]:
        """The predictions for files one after the other, while the files behind them are still unread."""
        for numbers, inputs, failures in self.read(files, batch_size, workers):
            names = [str(files[number]) for number in numbers]
            told = dict(zip(numbers, self.told(inputs, names, top, flip), strict=True))
            for number, reason in failures:
                told[number] = Prediction(str(files[number]), "", float("nan"), {}, reason)
            yield from (told[number] for number in sorted(told))

    def batches(
        self,
        files: Sequence[str | Path],
        labels: Tensor,
        *,
        batch_size: int = BATCH,
        workers: int = 1,
        opened: Callable[[str], Path | bytes] = Path,
        failed: Callable[[str, str], object] = lambda file, reason: None,
    ) -> Iterator[Batch]:
        """Files with their class numbers as batches for `evaluate`.

        Args:
            labels: int64 class numbers, one per file.
            opened: from a file's name to where it is, or to what is in it.
            failed: is told of each file that cannot be read, and why.
        """
        for numbers, inputs, failures in self.read(files, batch_size, workers, opened):
            for number, reason in failures:
                failed(str(files[number]), reason)
            chosen = torch.tensor(numbers, dtype=torch.int64)
            own = labels[chosen].to(self.device)
            if numbers:
                yield Batch(inputs, own, own, chosen)

    def read(
        self,
        files: Sequence[str | Path],
        batch_size: int,
        workers: int,
        opened: Callable[[str], Path | bytes] = Path,
    ) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Batch by batch: numbers of the files that could be read, their inputs, and the others with the reason.

        While one batch is used, threads decode the next: Pillow lets go of Python's lock.
        """
        parts = [range(len(files))[start : start + batch_size] for start in range(0, len(files), batch_size)]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            ahead = deque[list[Future[Tensor | str]]]()
            for number, part in enumerate(parts):
                for later in parts[number + len(ahead) : number + 2]:
                    ahead.append([pool.submit(self.pixels, str(files[place]), opened) for place in later])
                read = [(place, decoding.result()) for place, decoding in zip(part, ahead.popleft(), strict=True)]
                images = [(place, found) for place, found in read if isinstance(found, Tensor)]
                failures = [(place, found) for place, found in read if isinstance(found, str)]
                stack = torch.stack([image for _, image in images]) if images else None
                inputs = self.preprocessing.example[:0] if stack is None else self.normalised(stack)
                yield [place for place, _ in images], inputs, failures

    def pixels(self, file: str, opened: Callable[[str], Path | bytes]) -> Tensor | str:
        """The pixels of a file, or why it cannot be read."""
        try:
            return self.preprocessing.of_file(opened(file))
        except UnreadableImage as error:
            return error.reason

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, C) -> inputs (N, C, H, W) on the device."""
        return normalised(images.to(self.device), self.preprocessing.mean, self.preprocessing.std)

    @torch.inference_mode()
    def told(self, inputs: Tensor, files: Sequence[str], top: int | None, flip: bool) -> list[Prediction]:
        """What the network says of inputs."""
        if not len(inputs):
            return []
        inputs = inputs.to(self.device)
        logits = self.model(inputs).float()
        if flip:
            logits = (logits + self.model(inputs.flip(-1)).float()) / 2
        shares, places = logits.softmax(1).topk(min(top or len(self.classes), len(self.classes)))
        found = []
        for file, own, order in zip(files, shares.tolist(), places.tolist(), strict=True):
            told = {self.classes[place]: share for place, share in zip(order, own, strict=True)}
            found.append(Prediction(file, self.classes[order[0]], own[0], told))
        return found


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Files as they are given, and all images below folders, sorted; hidden ones and linked folders are left out.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(images_below(path))
            if not below:
                raise DataError(f"{printable(path)} holds no images")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{printable(path)} does not exist")
    return found


def images_below(folder: Path) -> Iterator[Path]:
    """The files with an image's suffix anywhere below a folder."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent, name)
