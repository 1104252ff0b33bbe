"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli & Storkey, NeurIPS 2019, 1905.09768v3).

A generator learns to make images on which the student's belief is far from the teacher's, and the student learns to
believe what the teacher does on them. With ``D(x) = KL(softmax(T(x) / t) || softmax(S(x) / t))``, ``t = 1``, teacher
first (equation 1), and the attention map ``f(A) = 1 / N_c sum_c a_c^2`` of a layer:

    L_G = -D(G(z))                                                                        (the generator's, equation 2)
    L_S = D(x) + beta sum_l || f(A_l^T) / |f(A_l^T)| - f(A_l^S) / |f(A_l^S)| ||           (the student's, equation 3)

Paper and code were both read. What the paper fixes: one generator step and ten student steps a round on one batch of
latents, Adam with a cosine down to 0, beta 250 on the outputs of the three groups of a wide residual network, 80,000
rounds for CIFAR-10 and 50,000 for SVHN, the last student is the result. What its code does instead or adds, and the
presets follow:

- the generator's learning rate is 1e-3, the student's 2e-3 (the paper: 2e-3);
- gradients of both are clipped to the norm 5;
- the divergence is the mean over images *and classes*, a tenth of the paper's with ten classes, so that beta and the
  clipping weigh accordingly (``divergence: elements``, or ``images``);
- the attention distance is the mean of the squared differences (``attention_distance: squared-mean``, or ``norm``);
- batches of 128; the generator's layers, which the paper only counts.

``paper`` keeps one batch of latents for all steps of a round: the images are made once more from the same latents
behind the generator's step, and the student takes its ten steps on them. ``fresh`` draws new latents for each student
step, which a reproduction (Ferles et al.) found one to three points better.

What we chose: sizes other than 32x32, as multiples of 4; attention layers found by themselves
(:func:`zskd_nni.training.attention_transfer.attention_pairs`); all random numbers come from streams named after seed,
round and step, so that nothing but tensors must be saved, and a resumed run goes on bit by bit on the CPU.

The images live in the teacher's *normalised* space and are not bounded to its value range: the last layer is a
BatchNorm with weights of its own, without a tanh, as in the code.

``best`` is what later generator methods added, beside the student's own recipe in the place of the game's:

    L_G = -a D(G(z, y)) + c CE(T(G(z, y)), y) + s R(G(z, y)) + v TV(G(z, y))

with a class ``y`` that each image shall be seen as (DAFL, ICCV 2019), the distance R of the images as a crowd from what
the teacher's BatchNorm layers remember (DeepInversion, CVPR 2020), a smoothness prior (off), images bounded to the
value range, and a memory of the images of earlier rounds, from which the student learns (CMI, IJCAI 2021), the first of
them made before it has learnt anything, beside procedural figures. The generator's first layer is drawn anew each
round, so that rounds differ (as in NAYER, CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

# The whole game.


PRESETS: dict[str, dict[str, Any]] = {
    # The paper, with its code's reductions, learning rates and clipping.
    "paper": {"latents": "same"},
    # New latents for each student step: one to three points better in a reproduction. It costs a pass of generator and
    # teacher for each student step instead of each round.
    "fresh": {"latents": "fresh"},
    # A memory, a class for each image, the teacher's statistics; the student keeps a recipe of its own. Chosen on the
    # validation slice with LeNet-5, which has no statistics; docs/methods/zskt.md has the measurements.
    "best": {
        "generator_range": "bounded",
        "divergence": "images",
        "attention": "none",
        "memory": 24_000,
        "new_images": 256,
        "filling": 10,
        "figures": 12_000,
        "generator_steps": 10,
        "student_steps": 50,
        "class_weight": 0.3,
        "batch_statistics": 0.1,
        "renewed": True,
    },
}


class Zskt:
    """ZSKT as a method of recipes: a live source for whatever student the recipe makes."""

    name = "zskt"
    presets = tuple(PRESETS)

    def options(self, preset: str, given: Mapping[str, Any]) -> ZsktSettings:
        """The preset with the recipe's own keys over it."""
        return preset_options(ZsktSettings, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> ZsktSource:
        """A generator that learns against the student it is given; ``size`` and ``folder`` are of no meaning.

        Raises:
            UserError: pairs of attention layers are named: the student's loss is its caller's.
        """
        if not isinstance(request.options.attention, str):
            raise UserError(
                "transfer.attention: as a recipe's source ZSKT has no part in the student's loss, so that layers for "
                "attention transfer cannot be named; leave the key out (train_zskt in Python plays the whole game)."
            )
        return ZsktSource(teacher, request.options, request.batch_size, request.seed)


METHOD = Zskt()
