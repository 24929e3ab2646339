"""Class names of a source: their order, their numbers, and the checks that writers of files share."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fastkd.console import printable
from fastkd.data.image_files import folded, some
from fastkd.data.writer_api import stratified_split
from fastkd.errors import InputError

MAX_CLASS_FILE_BYTES = 64 << 20


class Codes:
    """Numbers class names in the order in which they are first seen, so that labels are kept as integers."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        """Return the code of a class name."""
        return self.seen.setdefault(name, len(self.seen))


def ordered(names: Iterable[str]) -> list[str]:
    """Return class names in order: numbers if all are plain decimal numbers, otherwise by code points."""
    names = set(names)
    return sorted(names, key=int) if all(map(_is_number, names)) else sorted(names)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def read_classes(file: Path) -> list[str]:
    """Read class names from a text file, one a line.

    Raises
    ------
    InputError
        It cannot be read, is not UTF-8, or holds an empty line or a name twice.
    """
    try:
        if file.stat().st_size > MAX_CLASS_FILE_BYTES:
            raise InputError(f"{file}: {file.stat().st_size:,} bytes; expected one class name a line")
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); classes= names a file, one class a line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8; expected one class name a line") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise InputError(f"{file}: line {names.index('') + 1} is empty; expected one class name a line")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{file}: class names that stand there twice: {some(twice)}")
    return names


def number_labels(
    where: str, codes: Codes, splits: Mapping[str, np.ndarray], classes: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Turn the codes of class names into labels.

    Parameters
    ----------
    where
        The source, for messages.
    splits
        Codes of train and val (int32 [N] each).
    classes
        Names of the classes; a label may also be the number of a class. None: those of train, `ordered`.

    Returns
    -------
    labels
        int32 [N] for each split.
    classes
        Names of the K classes.
    warnings
        Texts.

    Raises
    ------
    InputError
        A label is not a class, or a class of val is not in train.
    """
    names = list(codes.seen)
    texts: list[str] = []
    used = {split: [names[code] for code in np.unique(labels)] for split, labels in splits.items()}
    chosen = list(classes) if classes is not None else ordered(used["train"])
    if classes is None:
        refuse_unknown(f"{where}: val", f"{where}: train", used["val"], chosen)
        texts += _gaps(where, chosen)
    numbers = {name: number for number, name in enumerate(chosen)}
    if classes is not None:
        numbers = {str(number): number for number in range(len(chosen))} | numbers
        if unknown := list(dict.fromkeys(name for split in used.values() for name in split if name not in numbers)):
            raise InputError(
                f"{where}: labels that are no class: {some(unknown)}; expected one of the {len(chosen)} class names "
                f"({some(chosen)}) or a number in 0…{len(chosen) - 1}"
            )
    table = np.array([numbers.get(name, -1) for name in names], np.int32)
    labels = {split: table[split_codes] for split, split_codes in splits.items()}
    return labels, chosen, texts + warnings(f"{where}: val", where, chosen, labels["val"])


def _gaps(where: str, classes: Sequence[str]) -> list[str]:
    """Return a warning if classes are numbers with gaps: a teacher's outputs would be in another order."""
    if not all(map(_is_number, classes)) or classes == [str(number) for number in range(len(classes))]:
        return []
    return [
        f"{where}: the labels are numbers, but not 0…{len(classes) - 1}: {some(classes)}. They are stored as "
        f"0…{len(classes) - 1} in ascending order; a teacher whose outputs follow the original numbers does not fit"
    ]


def refuse_unknown(val: str, train: str, names: Iterable[str], classes: Sequence[str]) -> None:
    """Refuse classes of val that train lacks; name those that differ only in case or accents."""
    known = set(classes)
    if not (unknown := [name for name in names if name not in known]):
        return
    near = {folded(name): name for name in classes}
    alike = [f"{name} and {near[folded(name)]}" for name in unknown if folded(name) in near]
    hint = f"; names that differ only in case or accents: {some(alike)}" if alike else ""
    shown = [printable(name, one_line=True) for name in unknown[:5]]
    raise InputError(f"{val}: the classes {shown} are not in {train}{hint}")


def warnings(val: str, train: str, classes: Sequence[str], val_labels: Iterable[int] | np.ndarray) -> list[str]:
    """Return warnings of class names that look alike, and of classes without an image in val."""
    texts = []
    counts = Counter(map(folded, classes))
    if alike := [name for name in classes if counts[folded(name)] > 1]:
        texts.append(f"{train}: class names that differ only in case or accents: {some(alike)}")
    in_val = set(np.unique(np.asarray(val_labels)).tolist())
    if absent := [name for label, name in enumerate(classes) if label not in in_val]:
        texts.append(f"{val}: no images of {len(absent)} of {len(classes)} classes: {some(absent)}")
    return texts


def cut_val(where: str, labels: np.ndarray, val_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split samples by `stratified_split`; refuse a source in which nothing is left for val."""
    train, val = stratified_split(labels, val_ratio, seed)
    if len(val) == 0:
        raise InputError(f"{where}: every class has one image only, so none is left for val; add images")
    return train, val
