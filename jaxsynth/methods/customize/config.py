"""What a customisation run is told."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Distinct, Natural, OneOf, Seed, check_limits
from jaxsynth.core.places import Clip, MaybeFile, MaybeFileOrFolder, MaybeFolder, Pipeline, Place
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, Dataset
from jaxsynth.data.faces import known_people
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.customize.faces import FaceEncoderConfig
from jaxsynth.tasks.customize import (
    CaptionConfig,
    DreamBoothConfig,
    ImagePromptConfig,
    InstantIDConfig,
    InversionConfig,
    Training,
)
from jaxsynth.tasks.motion import AnimateDiffConfig, ClipConfig, MotionLoRAConfig
from jaxsynth.training.sharding import MeshConfig

TECHNIQUES: dict[str, type] = {
    "textual_inversion": InversionConfig,
    "dreambooth": DreamBoothConfig,
    "lora": CaptionConfig,
    "ip_adapter": ImagePromptConfig,
    "instantid": InstantIDConfig,
    "animatediff": AnimateDiffConfig,
    "motion_lora": MotionLoRAConfig,
}
# Of other programs, and not of this one.
_WAITING = {
    "controlnet": "ControlNet is the method controlled (configs/controlled.py)",
}


@dataclass(frozen=True)
class Config:
    """One run: one technique with every seed.

    `base` and `clip` are folders, hub ids, or the shipped "tiny" and "tiny/clip"; `dtype` is the
    type of the frozen networks. `image_size` is the side in pixels of the images that are learned
    and drawn (0: the base's own). `shots` training images of each class of `data` are learned from
    (0: all of them). `word` says what the subject is ("dog"): "textual_inversion" and "dreambooth"
    learn one subject, so that the data have one class; "lora" and "ip_adapter" learn images by
    their captions and have no word. `prompts` are held out from training, with {} for the subject
    where there is one; `generate.images_per_class` images of each are drawn by the untouched base
    and by the customised one. The settings of the technique are those under its own name.

    For "lora" with an `unmasked_weight` below 1, `mask_folder` has the masks of images, of their
    names and white where they count, unless the data know them.

    For "ip_adapter" each prompt is drawn for each of `references` held-out images, which
    `image_encoder` sees: the folder of a CLIP or of its image tower, `clip` unless given.

    For "instantid" the references are faces, each drawn with the keypoints of the next. `faces` is
    an .npz of "ids" (of the images of the data, which must be square), "embeddings" and "keypoints"
    (x, y) of left eye, right eye, nose and corners of the mouth. Data that know their people need
    none: two encoders of `face_encoder` learn to tell them apart, of which one judges.

    "animatediff" and "motion_lora" learn from clips (`data.source` "clips", or the drawn "moving"),
    of which an animation of each prompt is drawn. `motion` are the motion modules, a folder or a
    file, that "motion_lora" adapts. `domain_adapter` is a LoRA of the looks of the clips, which is
    in the base while "animatediff" learns and in no drawing: the modules then learn motion alone.
    """

    method: str = "customize"
    technique: str = "textual_inversion"
    base: Pipeline = "tiny"
    clip: Clip = "tiny/clip"
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    image_size: Natural = 0
    data: DataConfig = field(default_factory=DataConfig)
    shots: Natural = 0
    word: str = ""
    prompts: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0, 1, 2)
    textual_inversion: InversionConfig | None = None
    dreambooth: DreamBoothConfig | None = None
    lora: CaptionConfig | None = None
    mask_folder: MaybeFolder = ""
    ip_adapter: ImagePromptConfig | None = None
    references: Natural = 0
    image_encoder: Annotated[
        str, Place(model=True, has=("config.json", "image_encoder/config.json"), words=("",))
    ] = ""
    instantid: InstantIDConfig | None = None
    faces: MaybeFile = ""
    face_encoder: FaceEncoderConfig | None = None
    animatediff: AnimateDiffConfig | None = None
    motion_lora: MotionLoRAConfig | None = None
    motion: MaybeFileOrFolder = ""
    domain_adapter: MaybeFileOrFolder = ""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.technique not in TECHNIQUES:
            why = _WAITING.get(self.technique, "")
            raise ValueError(
                f"technique: {self.technique!r} is not implemented{why and f' ({why})'}, expected "
                f"one of {', '.join(TECHNIQUES)}"
            )
        for name in TECHNIQUES:
            if name != self.technique and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: settings of another technique than {self.technique!r}; leave them "
                    f"out, or choose technique={name}"
                )
        if getattr(self, self.technique) is None:
            object.__setattr__(self, self.technique, TECHNIQUES[self.technique]())
        check_limits(self)
        self._check_faces()
        buckets = getattr(self.training, "buckets", None)
        if buckets is not None and buckets.enabled and self.data.image_size:
            raise ValueError(
                f"data.image_size: {self.data.image_size} cuts images to squares before they come "
                f"to {self.technique}.buckets; set it to 0"
            )
        if self.sees_images != bool(self.references):
            why = "draws like held-out images" if self.sees_images else "draws like no image"
            raise ValueError(f"references: {self.references}, but {self.technique} {why}")
        if self.mask_folder and getattr(self.training, "unmasked_weight", 1) == 1:
            raise ValueError(
                f"mask_folder: masks are for lora.unmasked_weight below 1, which {self.technique} "
                "does not have here; leave it out"
            )
        if self.image_encoder and (not self.sees_images or self.sees_faces):
            raise ValueError(f"image_encoder: {self.technique} sees no images; leave it out")
        if (self.technique == "motion_lora") != bool(self.motion):
            why = "adapts motion modules; say which" if not self.motion else "adapts none"
            raise ValueError(f"motion: {self.motion!r}, but {self.technique} {why}")
        if self.domain_adapter and self.technique != "animatediff":
            raise ValueError(
                f"domain_adapter: {self.domain_adapter!r} is for animatediff, not {self.technique}"
            )
        if not self.prompts:
            raise ValueError("prompts: expected at least one")
        if len(set(self.prompts)) < len(self.prompts):
            raise ValueError("prompts: the same is given twice")
        if self.has_subject != bool(self.word):
            why = "needs the class of its subject" if self.has_subject else "learns no subject"
            raise ValueError(f"word: {self.word!r}, but {self.technique} {why}")
        for prompt in self.prompts:
            if prompt.count("{}") != int(self.has_subject):
                wanted = "one {} for the subject" if self.has_subject else "no {}"
                raise ValueError(f"prompts: {prompt!r}, expected {wanted} for {self.technique}")

    def _check_faces(self) -> None:
        if not self.sees_faces:
            for name in ("faces", "face_encoder"):
                if getattr(self, name):
                    raise ValueError(f"{name}: {self.technique} sees no faces; leave it out")
        elif self.faces and self.face_encoder is not None:
            raise ValueError("face_encoder: `faces` has embeddings already; leave one of them out")
        elif not self.faces and self.face_encoder is None:
            object.__setattr__(self, "face_encoder", FaceEncoderConfig())

    @property
    def has_subject(self) -> bool:
        """Whether one subject is learned, which prompts name."""
        return self.technique in ("textual_inversion", "dreambooth")

    @property
    def sees_images(self) -> bool:
        """Whether images prompt beside the text."""
        return self.technique in ("ip_adapter", "instantid")

    @property
    def sees_faces(self) -> bool:
        """Whether these are faces, which a face encoder sees."""
        return self.technique == "instantid"

    @property
    def sees_clips(self) -> bool:
        """Whether motion is learned, from clips."""
        return issubclass(TECHNIQUES[self.technique], ClipConfig)

    @property
    def training(self) -> Training:
        """The settings of the technique."""
        found: Any = getattr(self, self.technique)
        return found

    def check(self, data: Dataset) -> None:
        """UserError for data that the technique cannot learn from."""
        if self.references > len(data.test):
            raise UserError(
                f"references: {self.references}, but only {len(data.test)} images are held out"
            )
        if self.face_encoder is not None and not known_people(data):
            raise UserError(
                "data: not known whose face each image shows; give embeddings and keypoints by "
                "--config.faces=FILE.npz"
            )
        if self.has_subject and data.num_classes != 1:
            raise UserError(
                f"data: {counted(data.num_classes, 'class')}, and {self.technique} learns one "
                f"subject; choose one, as by --config.data.class_names={data.class_names[0]}"
            )
