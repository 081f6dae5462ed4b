"""What a run of generated weights is told: concepts, editors, LoRAs, generators."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.limits import Count, Distinct, Natural, NotNegative, Range, Seed, check_limits
from jaxsynth.core.places import MaybeFile, Pipeline
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.procedural.concepts import (
    COLOURS,
    FAMILIES,
    Concept,
    builtin_concepts,
    check_families,
    read_concepts,
)
from jaxsynth.methods.weightgen.editors import Adapter, EditorConfig, Networks
from jaxsynth.methods.weightgen.edits import EditsConfig
from jaxsynth.methods.weightgen.generator import GeneratorConfig
from jaxsynth.tasks.gan import E2GAN_TARGETS
from jaxsynth.training.sharding import MeshConfig


@dataclass(frozen=True)
class ConceptConfig:
    """Where concepts come from, and how many of them are for what.

    `source` is "builtin" (`families`, `colours`, `combinations` of two), "file" (`path`) or
    "server" (`url` of an OpenAI-compatible server, `model`). The first `base` of the `train`
    concepts are those that the editor itself learns.
    """

    source: Literal["builtin", "file", "server"] = "builtin"
    families: tuple[str, ...] = FAMILIES
    colours: tuple[str, ...] = COLOURS
    combinations: Natural = 0
    path: MaybeFile = ""
    url: str = ""
    model: str = ""
    train: Count = 96
    validation: Annotated[int, Range(2)] = 8
    unseen: Annotated[int, Range(2)] = 16
    base: Count = 8

    def __post_init__(self):
        check_limits(self)
        check_families(self.families)
        if self.base > self.train:
            raise ValueError(f"concepts: base {self.base} of train {self.train} concepts")
        uses = {"builtin": (), "file": ("path",), "server": ("url", "model")}[self.source]
        for name in ("path", "url", "model"):
            if bool(value := getattr(self, name)) != (name in uses):
                raise ValueError(
                    f"concepts.{name} is {value!r}, but source is {self.source!r}: expected "
                    + ("a value" if name in uses else "none")
                )

    @property
    def each(self) -> int:
        """How many concepts of a family a server is asked for."""
        return -(-(self.train + self.validation + self.unseen) // len(self.families))

    def load(self, seed: int) -> list[Concept]:
        """All concepts of a source that is here. ValueError for a server, which a stage asks."""
        if self.source == "server":
            raise ValueError("concepts.source is 'server': its concepts are not here")
        if self.source == "file":
            return read_concepts(self.path)
        return builtin_concepts(
            self.families, colours=self.colours, combinations=self.combinations, seed=seed
        )


@dataclass(frozen=True)
class Variant:
    """One way to generate: the generator, the time `t` of its one step (-1: the last), and which
    factors of a LoRA stand for its product ("none": as trained, "svd" or "aligned" to the first
    concept's; `adapters.blocks.canonical`)."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    t: Annotated[int, Range(-1)] = -1
    canonical: Literal["none", "svd", "aligned"] = "none"


@dataclass(frozen=True)
class Config:
    """One run. `text` is a Stable Diffusion folder whose text encoder reads the prompts.

    `rank` is that of the LoRAs, on the layers that the paper adapts.
    `checkpoints` is K, how many late states of each LoRA are kept; `block` the values in a block.
    `generators` are compared on validation concepts by the mean L1 after `ablation_at` steps, and
    the best is the one that the comparison reports. `noise` is the standard deviation of the noise
    on the nearest concept's LoRA, relative to each weight's spread over the concepts. `mesh` is
    what the base, the collection (its concepts over "data") and the generators train on; `memory`
    is that of one of its devices in GiB: where the LoRAs of all concepts together need more, as
    many as fit train at a time. 0: there is no limit.
    """

    method: str = "weightgen"
    text: Pipeline = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    photos: Count = 256
    held_out: Count = 32
    concepts: ConceptConfig = field(default_factory=ConceptConfig)
    edits: EditsConfig = field(default_factory=EditsConfig)
    editor: EditorConfig = field(default_factory=EditorConfig)
    rank: Count = 4
    checkpoints: Count = 4
    block: Count = 256
    generators: dict[str, Variant] = field(default_factory=dict)
    few_steps: Annotated[int, Range(2)] = 4
    ablation_at: Annotated[tuple[Natural, ...], Distinct()] = (0, 5, 20)
    noise: NotNegative = 0.3
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0,)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    memory: NotNegative = 0.0

    def __post_init__(self):
        check_limits(self)
        if not self.generators:
            raise ValueError("generators: expected at least one")
        if self.editor.pairs > self.photos:
            raise ValueError(f"editor.pairs is {self.editor.pairs} of {self.photos} photos")
        for name, variant in self.generators.items():
            if variant.canonical != "none" and not self.editor.train_down:
                raise ValueError(
                    f"generators.{name}.canonical is {variant.canonical!r}, but without "
                    "editor.train_down there are no pairs of factors to choose"
                )

    @property
    def networks(self) -> Networks:
        """The editor's two networks."""
        return Networks(self.editor.generator, self.editor.discriminator)

    @property
    def adapter(self) -> Adapter:
        """The adapter of every concept."""
        lora = LoRAConfig(rank=self.rank, targets=E2GAN_TARGETS)
        return Adapter(lora, self.editor.train_down, self.block)
