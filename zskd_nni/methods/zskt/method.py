"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli & Storkey, NeurIPS 2019, 1905.09768v3).

A generator G learns to make images on which the student S and the teacher T disagree, and the student learns to agree
with the teacher on them. With latents z ~ N(0, I), temperature t = 1 and the attention map f(A) = mean_c a_c^2 of a
layer's channels a_c:

    D(x) = KL(softmax(T(x) / t) || softmax(S(x) / t))                          divergence               (equation 1)
    L_G = -D(G(z))                                                             the generator's loss     (equation 2)
    L_S = D(x) + beta sum_l || f(A_l^T) / |f(A_l^T)| - f(A_l^S) / |f(A_l^S)| ||    the student's loss   (equation 3)

A round: draw latents z; G takes n_G steps on L_G; S takes n_S steps on L_S with x = G(z) (algorithm 1). The generator's
side is ``source.py``, the student's side ``train.py``.

We read both the paper and its code. What the paper fixes: one generator step and ten student steps a round on one batch
of latents, Adam with a cosine down to 0, beta 250 on the outputs of the three groups of a wide residual network, 80,000
rounds for CIFAR-10 and 50,000 for SVHN. The last student is the result. What its code does instead or adds, and the
presets follow:

- the generator's learning rate is 1e-3, the student's 2e-3 (the paper: 2e-3);
- gradients of both are clipped to the norm 5;
- the divergence is the mean over images *and classes*, with ten classes a tenth of the paper's; this changes the effect
  of beta and of clipping (``divergence: elements``, or ``images``);
- the attention distance is the mean of the squared differences (``attention_distance: squared-mean``, or ``norm``);
- batches of 128; the generator's layers, which the paper only counts.

``paper`` keeps one batch of latents for all steps of a round: after the generator's step the images are made once more
from the same latents, and the student takes its ten steps on them. ``fresh`` draws new latents for each student step,
which a reproduction (Ferles et al.) found one to three points better.

What we chose: sizes other than 32x32, as multiples of 4; attention layers that are found automatically
(:func:`zskd_nni.training.attention_transfer.attention_pairs`); random streams named after seed, round and step. No
random state needs saving, and a resumed run continues bit by bit on the CPU.

The images live in the teacher's *normalised* space and are not bounded to its value range: as in the code, the last
layer is a BatchNorm with weights of its own, without a tanh.

``best`` takes what later methods added to the generator, and leaves the student's training to the caller's recipe:

    L_G = -a D(G(z, y)) + c CE(T(G(z, y)), y) + s R(G(z, y)) + v TV(G(z, y))                            (equation 4)

- y is a class that the teacher is to see in the image (DAFL, ICCV 2019);
- R is the distance of the images' BatchNorm statistics from the teacher's (DeepInversion, CVPR 2020);
- TV is a smoothness prior (off);
- images are bounded to the value range;
- the student's batches are drawn from a memory of earlier rounds' images (CMI, IJCAI 2021) and of procedural figures;
  the first images in it are made before the student has learnt anything;
- the generator's first layer is drawn anew each round, so that rounds differ (as in NAYER, CVPR 2024).
"""

from __future__ import annotations

from typing import Any

from zskd_nni.methods.registry import PresetMethod, TransferRequest
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.methods.zskt.source import ZsktSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    # The paper, with its code's reductions, learning rates and clipping.
    "paper": {"latents": "same"},
    # New latents for each student step: one to three points better in a reproduction. Generator and teacher then run
    # once a student step instead of once a round.
    "fresh": {"latents": "fresh"},
    # Equation 4. Chosen on the validation slice with LeNet-5, which has no BatchNorm; docs/methods/zskt-trials.md
    # has the measurements.
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


class Zskt(PresetMethod):
    """ZSKT as a method of recipes: a live source for the recipe's student."""

    def source(self, teacher: Teacher, request: TransferRequest) -> ZsktSource:
        """A generator that is trained against the student that asks for images; ``size`` and ``folder`` are ignored.

        Raises:
            UserError: pairs of attention layers are named, but the student's loss is the caller's.
        """
        if not isinstance(request.options.attention, str):
            raise UserError(
                "transfer.attention: as a recipe's source ZSKT has no part in the student's loss, so that layers for "
                "attention transfer cannot be named; leave the key out (train_zskt in Python is the whole training)."
            )
        return ZsktSource(teacher, request.options, request.batch_size, request.seed)


METHOD = Zskt("zskt", ZsktSettings, PRESETS)
