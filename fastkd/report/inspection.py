"""Inspects a RUN by its parents: the selection, samples, and the accuracy of each class.

Parents are searched by their keys, at the paths of the RUN's recipe. If one is missing or was replaced, an error of
`fastkd.errors` says why.
"""

import base64
import io
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fastkd import artifacts, console, models
from fastkd.artifacts import Artifact, Kind
from fastkd.data.order import split_holdout
from fastkd.engine.inference import predict
from fastkd.errors import ArtifactError, FastkdError, InputError
from fastkd.kernels import class_ranks
from fastkd.pipeline import Pipeline
from fastkd.recipe.tables import SCORES, method_name
from fastkd.report import subset_plots
from fastkd.report.runs import RunFacts
from fastkd.validation import user_model

EVAL_BATCH_SIZE = 256
THUMBNAIL_PX = 96
PER_GROUP = 8
BLACK, FLAT_STD = 8, 2.0  # an image is black up to this value, and of one colour below this deviation (of 255)
GROUPS = (("easy", 0.0, 0.1), ("medium", 0.45, 0.55), ("hard", 0.9, 1.0))
"""Ranges of difficulty ranks within a class, from which samples are shown."""


@dataclass(frozen=True)
class Selection:
    """The kept samples, by difficulty and by class.

    Attributes
    ----------
    difficulty : float32 [n]
        Of the training samples without the hold-out.
    kept : bool [n]
    labels : int64 [n] or None
        None: the DATASET and the SCORES are missing.
    class_counts : int64 [K]
        Number of kept samples of each class.
    sigma : float64 [K]
        σ of the teacher's logits of each class.
    """

    subset: Artifact
    method: str
    score: str
    difficulty: np.ndarray
    kept: np.ndarray
    labels: np.ndarray | None
    class_counts: np.ndarray
    sigma: np.ndarray

    @property
    def class_sizes(self) -> np.ndarray | None:
        """Number of samples of each class before the selection (int64 [K])."""
        return None if self.labels is None else np.bincount(self.labels, minlength=len(self.sigma))

    @property
    def kept_alike(self) -> str:
        """A sentence in place of a chart, if the same share of each class was kept, to a percent; otherwise empty."""
        sizes_K = self.class_sizes
        if sizes_K is None:
            counts = np.unique(self.class_counts)
            return f"{counts[0]:,} samples of each class were kept. " if len(counts) == 1 else ""
        share_K = 100 * self.class_counts[sizes_K > 0] / sizes_K[sizes_K > 0]
        if share_K.max() - share_K.min() > 1:
            return ""
        return f"{self.class_counts.sum() / sizes_K.sum():.0%} of each class was kept. "

    @property
    def is_negated(self) -> bool:
        """Whether difficulty is the negative of the score, since a large score is easy."""
        return SCORES[self.score] < 0


@dataclass(frozen=True)
class Sample:
    """A training sample to show. `flaw` says what is wrong with its image; empty: nothing."""

    sample_id: int
    uri: str
    label: str
    guess: str | None
    score: float
    flaw: str

    @property
    def score_text(self) -> str:
        """The score, formatted for the caption of the image."""
        return "<0.001" if 0 <= self.score < 0.001 else f"{self.score:.2g}"

    @property
    def is_doubted(self) -> bool:
        """Whether the teacher predicts another class."""
        return self.guess is not None and self.guess != self.label


@dataclass(frozen=True)
class Samples:
    """Samples of one range of difficulty."""

    name: str
    kept: list[Sample]
    dropped: list[Sample]


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of student and teacher on each class of val.

    Attributes
    ----------
    student, teacher : float64 [K]
        NaN if val has no samples of a class.
    count : int64 [K]
        Number of samples of each class.
    confusions : list of (label, prediction, count)
        The most frequent errors of the student.
    without_teacher : str
        The reason, if `teacher` is None.
    """

    student: np.ndarray
    teacher: np.ndarray | None
    count: np.ndarray
    confusions: list[tuple[str, str, int]]
    precision: str
    without_teacher: str

    @property
    def student_top1(self) -> float:
        """Of all of val (0…1)."""
        return _mean(self.student, self.count)

    @property
    def teacher_top1(self) -> float | None:
        """Of all of val (0…1)."""
        return None if self.teacher is None else _mean(self.teacher, self.count)


class Inspector:
    """Inspects a RUN with the pipeline of its recipe. Nothing is built."""

    def __init__(self, run: RunFacts) -> None:
        self.run = run

    @cached_property
    def _unseen(self) -> Pipeline:
        """The pipeline of its recipe, before its DATASET is opened."""
        recipe = self.run.recipe
        train = recipe.train.model_copy(update={"compile": False})  # compiling takes longer than one pass
        return Pipeline(recipe.model_copy(update={"train": train}), build=False)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of its recipe, after checking that the DATASET is the one that it was trained on."""
        dataset = self._unseen.dataset
        if dataset.key != self.run.artifact.manifest.parents["DATASET"]:
            raise ArtifactError(f"{dataset.path}: is not the DATASET that {self.run.path} was trained on")
        return self._unseen

    def _find(self, kind: Kind, key: str) -> Artifact:
        """Return the artifact with a key. Its own parents may be missing."""
        folder = self._unseen.store.directory
        for path, manifest in artifacts.published(folder, kind):
            if manifest.key == key:
                return artifacts.load(path, kind)
        raise InputError(f"{folder}: the {kind} that this student was trained on no longer exists")

    @cached_property
    def _scores(self) -> Artifact | None:
        """The SCORES by which samples were selected, if they exist."""
        try:
            return self._find("SCORES", self.selection_of.manifest.parents["SCORES"])
        except InputError:
            return None

    @cached_property
    def selection_of(self) -> Artifact:
        """The SUBSET that it was trained on."""
        run, export = self.run, None
        if "SUBSET" not in run.artifact.manifest.parents:
            if run.dynamic:
                raise InputError(
                    f"{run.dynamic} selects in each epoch, and trained on {run.trained_share:.1%} of the images of all "
                    "epochs; there is no fixed list of kept samples"
                )
            raise InputError("this student was trained on its whole data set, without a selection")
        with suppress(FastkdError, OSError):  # also if the data set is missing
            export = self.pipeline.images.export
        if export:
            raise InputError(f"{self.pipeline.dataset.path} is an export, which contains only the kept samples")
        return self._find("SUBSET", run.artifact.manifest.parents["SUBSET"])

    @cached_property
    def selection(self) -> Selection:
        """The kept samples. Labels are those of the DATASET; if it is missing, those of the SCORES."""
        subset = self.selection_of
        inputs = subset.manifest.inputs
        difficulty_N = np.asarray(subset.array("difficulty.npy"))  # loading checks its shape
        ids = split_holdout(len(difficulty_N), inputs["holdout_ratio"])[0]
        return Selection(
            subset,
            method_name(inputs),
            inputs.get("score", "cross_entropy"),
            difficulty_N[ids],
            np.isin(ids, np.asarray(subset.array("indices.npy"))),
            None if (y_N := self._labels()) is None else y_N[ids],
            np.array(subset.facts["class_counts"]),
            np.asarray(subset.array("class_std.npy")),
        )

    def _labels(self) -> np.ndarray | None:
        """Return the labels of train (int64 [N]). None: they are missing."""
        try:
            return self.pipeline.loader("train", 1).labels()
        except (FastkdError, OSError):
            return None if self._scores is None else np.asarray(self._scores.array("labels.npy"))

    def samples(self) -> list[Samples]:
        """Return easy, medium and hard samples, kept and dropped, evenly spread over the classes."""
        selection, pipeline = self.selection, self.pipeline
        names, ids = pipeline.dataset.facts["classes"], pipeline.images.train_ids
        y_n = pipeline.loader("train", 1).labels()[ids]
        place_n = class_ranks(selection.difficulty, y_n, len(names)) / np.bincount(y_n, minlength=len(names))[y_n]
        guesses = self._scores.array("logits.npy") if self._scores else None
        chosen = {
            (name, kept): _spread((place_n >= low) & (place_n <= high) & (selection.kept == kept), y_n)
            for name, low, high in GROUPS
            for kept in (True, False)
        }
        wanted = ids[np.unique(np.concatenate(list(chosen.values())))]
        images = self._images(wanted)

        def shown(at_n: np.ndarray) -> list[Sample]:
            return [
                Sample(
                    int(ids[at]),
                    images[int(ids[at])][0],
                    names[y_n[at]],
                    names[int(guesses[ids[at]].argmax())] if guesses is not None else None,
                    float(selection.difficulty[at]),
                    images[int(ids[at])][1],
                )
                for at in at_n
            ]

        return [Samples(name, shown(chosen[name, True]), shown(chosen[name, False])) for name, *_ in GROUPS]

    def sheet(self) -> Figure:
        """Draw samples by class and difficulty; see `fastkd.report.subset_plots`."""
        subset = self.selection.subset
        kept = np.asarray(subset.array("indices.npy"))
        return subset_plots.contact_sheet(self.pipeline, np.asarray(subset.array("difficulty.npy")), kept)

    def _images(self, ids: np.ndarray) -> dict[int, tuple[str, str]]:
        """Return the images that the student sees, as data URIs, and the flaw of each."""
        found: dict[int, tuple[str, str]] = {}
        if len(ids):
            for batch in self.pipeline.loader("train", 1).batches(ids, last="pad"):
                image_HWC = batch.images[0].permute(1, 2, 0).numpy()
                found[int(batch.sample_ids[0])] = data_uri(image_HWC), flaw_of(image_HWC)
        return found

    def accuracy_by_class(self) -> ClassAccuracy:
        """Run the student, and the teacher if it is available, on val."""
        pipeline, run = self.pipeline, self.run
        name = _known_model(run.recipe.student.model)
        net = models.build(name, pipeline.images.num_classes)
        models.load_weights(net, run.path, name=name)
        normalisation = models.native_normalisation(name, run.path) or pipeline.images.normalisation
        student = pipeline.runtime.to_device(models.Normalised(net, normalisation).eval())
        guess_N, label_N = self._predict(student, run.recipe.data.input_px, "student")
        count_K = np.bincount(label_N, minlength=pipeline.images.num_classes)
        teacher_K, why = None, ""
        try:
            theirs_N, _ = self._predict(self._teacher(), pipeline.images.teacher_px, "teacher")
            teacher_K = _by_class(theirs_N == label_N, label_N, count_K)
        except (InputError, RuntimeError) as error:  # torch: out of memory, or unsupported image size
            why = str(error)
        names = pipeline.dataset.facts["classes"]
        wrong = Counter(zip(label_N[guess_N != label_N].tolist(), guess_N[guess_N != label_N].tolist(), strict=True))
        return ClassAccuracy(
            _by_class(guess_N == label_N, label_N, count_K),
            teacher_K,
            count_K,
            [(names[label], names[guess], count) for (label, guess), count in wrong.most_common(5)],
            pipeline.runtime.precision,
            why,
        )

    def _teacher(self) -> nn.Module:
        if self.run.recipe.teacher is None:
            raise InputError("this student was trained without a teacher")
        for name in self.run.recipe.teacher.models:
            _known_model(name)
        teacher = self.pipeline.teacher
        recorded = self.run.artifact.manifest.inputs.get("teacher", {})
        if recorded.get("weights") != teacher.key_fields["weights"]:
            raise ArtifactError("the weights of the recipe's teacher have changed since this student was trained")
        return teacher.net

    def _predict(self, net: nn.Module, input_px: int | None, who: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted and the true class of each sample of val (int64 [N])."""
        ids = np.arange(self.pipeline.dataset.facts["counts"]["val"])
        loader = self.pipeline.loader("val", min(EVAL_BATCH_SIZE, len(ids)), input_px=input_px)
        guesses, done = [], 0
        with console.progress(f"report: {who} on val", len(ids)) as update:
            for batch in predict(self.pipeline.runtime, net, loader.batches(ids, last="pad")):
                guesses.append(batch.logits.argmax(axis=1))
                done += len(batch.labels)
                update(done, "")
        return np.concatenate(guesses), loader.labels()


def _known_model(name: str) -> str:
    """Refuse a network that is a user's code: a report runs none, since the RUN may come from anywhere."""
    if user_model(name):
        raise InputError(f"{name} is Python code, which a report does not run")
    return name


def data_uri(image_HWC: np.ndarray) -> str:
    """Return an image as a data URI: small ones as PNG, others as JPEG thumbnails of at most `THUMBNAIL_PX`."""
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    small = max(image.size) <= THUMBNAIL_PX // 2
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    if small:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(stream.getvalue()).decode()}"


def flaw_of(image_HWC: np.ndarray) -> str:
    """Return what is wrong with an image (uint8 [H, W, C]): black, or one colour; empty: nothing."""
    if image_HWC.max() <= BLACK:
        return "black"
    return "one colour" if image_HWC.std(axis=(0, 1)).max() < FLAT_STD else ""


def _spread(wanted_n: np.ndarray, y_n: np.ndarray) -> np.ndarray:
    """Return up to `PER_GROUP` of the given positions, evenly spread over the classes (int64)."""
    found = np.flatnonzero(wanted_n)
    found = found[np.argsort(y_n[found], kind="stable")]
    return found[np.unique(np.linspace(0, len(found) - 1, PER_GROUP).round().astype(int))] if len(found) else found


def _by_class(right_N: np.ndarray, label_N: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    right_K = np.bincount(label_N[right_N], minlength=len(count_K))
    return np.where(count_K > 0, right_K / np.maximum(count_K, 1), np.nan)


def _mean(share_K: np.ndarray, count_K: np.ndarray) -> float:
    return float(np.nansum(share_K * count_K) / count_K.sum())
