"""The folder of the artifacts of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd import artifacts, console
from fastkd.artifacts import Kind
from fastkd.distributed import current
from fastkd.errors import InputError


class MissingError(InputError):
    """An artifact is missing, and `ArtifactStore.build` is False."""

    def __init__(self, kind: Kind, path: Path) -> None:
        super().__init__(f"{path}: no {kind} for this recipe yet: python -m fastkd.train RECIPE builds it")
        self.path = path


@dataclass(frozen=True)
class ArtifactStore:
    """The folder of a recipe's SCORES, SUBSETs and LABELS.

    Attributes
    ----------
    directory
        The folder.
    force
        Names of the stages that run again although their artifact exists.
    build
        Whether missing artifacts are built. If False, a missing artifact is a `MissingError`.
    """

    directory: Path
    force: frozenset[str] = frozenset()
    build: bool = True

    def artifact_path(self, kind: Kind, key_fields: Mapping[str, Any]) -> Path:
        """Return the path of the artifact with these key fields.

        If it does not exist, the main process prints how the nearest existing artifact differs.

        Raises
        ------
        MissingError
            It does not exist, and `build` is False.
        """
        path = self.directory / f"{kind.lower()}-{artifacts.key_of(kind, key_fields)[:12]}"
        if self.build and not current().is_main:
            return path
        if not path.exists() and (near := artifacts.nearest(self.directory, kind, key_fields)):
            console.say(f"no {kind} for this recipe yet; the nearest is {near}")
        if not self.build and not path.exists():
            raise MissingError(kind, path)
        return path
