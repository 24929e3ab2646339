"""An ensemble of teachers as one teacher: the weighted mean of their logits, or of their probabilities."""

import torch
import xxhash
from torch import Tensor, nn

from fastkd.engine.runtime import Runtime
from fastkd.recipe import Teacher
from fastkd.stages.images import ImageSource
from fastkd.stages.teacher import LoadedTeacher, load_teacher


def load_ensemble(teacher: Teacher, images: ImageSource, runtime: Runtime) -> LoadedTeacher:
    """Load the networks of an ensemble.

    The key fields are those of all networks, with their weights in the mean.

    Parameters
    ----------
    teacher
        The recipe's section, with `ensemble` and `mix`.
    """
    members = teacher.ensemble
    loaded = [load_teacher(member, member.model, member.weights, images, runtime) for member in members]
    fields = [one.key_fields | {"weight": member.weight} for one, member in zip(loaded, members, strict=True)]
    digest = xxhash.xxh3_128_hexdigest("".join(one["weights"] for one in fields).encode())
    key_fields = {"model": f"ensemble of {len(fields)}", "weights": digest, "mix": teacher.mix, "members": fields}
    net = Ensemble([one.net for one in loaded], [member.weight for member in members], teacher.mix)
    warnings = tuple(warning for one in loaded for warning in one.warnings)
    return LoadedTeacher(runtime.to_device(net.eval()), key_fields, warnings)


class Ensemble(nn.Module):
    """The weighted mean of the outputs of networks.

    Parameters
    ----------
    nets
        Each maps images to logits [B, K].
    weights
        Positive; they are divided by their sum.
    mix
        ``"logits"``: the mean of the logits. ``"probabilities"``: the logarithm of the mean of the softmax at
        temperature 1, as in Hinton et al. 2015 ("Distilling the Knowledge in a Neural Network", section 3).
    """

    shares: Tensor

    def __init__(self, nets: list[nn.Module], weights: list[float], mix: str) -> None:
        super().__init__()
        self.nets, self.mix = nn.ModuleList(nets), mix
        self.register_buffer("shares", torch.tensor(weights, dtype=torch.float32) / sum(weights), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 logits [B, K] of images [B, 3, H, W]."""
        # CUDA graphs reuse their outputs.
        logits_EBK = torch.stack([net(images).float().clone() for net in self.nets])
        if self.mix == "logits":
            return (self.shares[:, None, None] * logits_EBK).sum(0)
        return (logits_EBK.log_softmax(-1) + self.shares.log()[:, None, None]).logsumexp(0)
