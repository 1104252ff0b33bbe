"""The settings of ZSKT; symbols are those of ``method.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zskd_nni.methods.zskt.generator import RANGES
from zskd_nni.runtime.validation import Bounds, Count, CountOrZero, NotNegative, Positive, Settings, one_of
from zskd_nni.training.hints import Pairs

_ENOUGH = "must be at least 2 for the generator's batch statistics"

Width = Annotated[int, Bounds("must be an even number of channels", lambda width: width >= 2 and width % 2 == 0)]
Batch = Annotated[int, Bounds(_ENOUGH, lambda images: images >= 2)]
NewImages = Annotated[CountOrZero, Bounds(_ENOUGH, lambda images: images != 1)]
Attention = Annotated[
    str | Pairs,
    Bounds(
        "is auto, none, or pairs of [teacher path, student path]",
        lambda layers: not isinstance(layers, str) or layers in ("auto", "none"),
    ),
]


@dataclass(frozen=True)
class ZsktSettings(Settings):
    """The adversarial training of generator and student.

    Attributes:
        rounds: N; both learning rates reach 0 there (80,000 for CIFAR-10, 50,000 for SVHN). As a live source the
            generator's schedule ends there: set it to the training's steps divided by ``student_steps``.
        generator_steps: n_G of a round.
        student_steps: n_S of a round.
        batch: images in a batch; a live source has the batch size it is asked for.
        latent: size of z.
        width: channels of the generator's first two convolutions; the third has half of them (the code's: 128). On a
            CPU and with a small student the generator takes most of the time; a quarter of the width costs a tenth.
        latents: ``same`` for all steps of a round, or ``fresh`` for each student step.
        generator_learning_rate: of Adam.
        student_learning_rate: of Adam; a live source ignores it.
        clip: largest norm of a gradient, of either network; a live source clips the generator's alone.
        temperature: t.
        divergence: mean over ``elements`` (code) or ``images`` (paper).
        attention: ``auto``, ``none``, or pairs ``[teacher path, student path]``; a live source ignores it.
        attention_weight: beta.
        attention_distance: ``squared-mean`` (code) or ``norm`` (paper).
        generator_range: at first the generator's images have mean 0 and deviation 1 in normalised space (``unit``, the
            code's) or fill the value range (``input``); or they never leave the value range (``bounded``).
        autocast: run the networks in bfloat16, with losses, weights and optimisers in float32: about twice as fast with
            wide residual networks. A live source does not change the student's own passes.
        memory: how many images of earlier rounds are kept; the student's batches are drawn from them. 0: it sees the
            images of its round alone. Memory and figures hold at most a GiB each: some 3,500 images of 3 x 224 x 224.
        new_images: images that a round adds to the memory; 0 for as many as in a batch.
        filling: rounds that fill the memory before the student's first step. Their generator loss leaves the
            divergence out, because the student has not learnt anything yet.
        figures: procedural images (``mixed`` of :mod:`zskd_nni.data.procedural`) that stay in the memory throughout.
        adversarial_weight: a, of the divergence in the generator's loss.
        class_weight: c, of the cross-entropy to the class that each image is meant to be of. Above 0, the generator
            gets the class too, and classes occur equally often.
        batch_statistics: s, of the distance between the images' BatchNorm statistics and the teacher's running ones
            (:mod:`zskd_nni.synthesis.batch_norm_statistics`). Ignored for a teacher without BatchNorm.
        total_variation: v, of the smoothness prior; images are in units of the value range.
        renewed: draw the generator's first layer anew each round, and keep its learning rate constant.

    Raises:
        ValueError: a value outside its range.
    """

    rounds: Count = 80_000
    generator_steps: Count = 1
    student_steps: Count = 10
    batch: Batch = 128
    latent: Count = 100
    width: Width = 128
    latents: Annotated[str, one_of("same", "fresh")] = "same"
    generator_learning_rate: Positive = 1e-3
    student_learning_rate: Positive = 2e-3
    clip: Positive = 5.0
    temperature: Positive = 1.0
    divergence: Annotated[str, one_of("elements", "images")] = "elements"
    attention: Attention = "auto"
    attention_weight: NotNegative = 250.0
    attention_distance: Annotated[str, one_of("squared-mean", "norm")] = "squared-mean"
    generator_range: Annotated[str, one_of(*RANGES)] = "unit"
    autocast: bool = False
    memory: CountOrZero = 0
    new_images: NewImages = 0
    filling: CountOrZero = 0
    figures: CountOrZero = 0
    adversarial_weight: NotNegative = 1.0
    class_weight: NotNegative = 0.0
    batch_statistics: NotNegative = 0.0
    total_variation: NotNegative = 0.0
    renewed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.memory and (self.filling or self.new_images or self.figures):
            raise ValueError("filling, new_images and figures are of images for the memory, and memory is 0")
