"""Every config file, in every variant, gives what its method takes, and says how it is run."""

import ast
from pathlib import Path

import pytest

from jaxsynth.cli import main as cli
from jaxsynth.core.config import ConfigError, load_config, to_dataclass
from jaxsynth.data.prompts import TEMPLATES, default_template
from jaxsynth.methods.customize.config import TECHNIQUES

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
# A config file that is not listed here fails, so that none goes untested.
VARIANTS = {
    "controlled": ("", "tiny", "edges", "sd21", "smoke"),
    "customize": (
        "",
        *(
            f"{variant},technique={technique}"
            for variant in ("tiny", "sd21", "sdxl", "smoke")
            for technique in TECHNIQUES
        ),
    ),
    "datadream": (
        "", "tiny", "digits", "photos", "recipes", "worth", "students", "sd21", "sdxl",
        "sdxl512", "smoke",
        *(
            f"paper,dataset={name}"
            for name in (
                "imagenet", "caltech101", "dtd", "eurosat", "fgvc_aircraft", "pets", "cars",
                "sun397", "food101", "flowers102",
            )
        ),
    ),
    "diffscaler": (
        "",
        "base",
        "base,path=photos",
        "tiny",
        "study",
        "conditions",
        "smoke",
        "xl2",
        "xl2,dataset=oxford_flowers102",
        "xl2,path=photos",
    ),
    "robustness": ("", "tiny", "full", "smoke", "imagenet"),
    "scaling": (
        "",
        "tiny",
        "prompts",
        "added_real",
        "amount",
        "practice",
        "imagenet",
        "imagenet,network=vit_s16",
        "imagenet,network=resnet50",
        "datadream",
        "smoke",
    ),
    "tiny_base": ("", "smoke"),
    "weightgen": ("", "tiny", "study", "factors", "full", "smoke"),
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_says_its_command_and_refuses_an_unknown_variant(path):
    documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"jaxsynth run --config=configs/{path.name}" in documentation
    with pytest.raises(ConfigError, match="no-such-variant"):
        load_config(f"{path}:no-such-variant")


@pytest.mark.parametrize(
    ("path", "variant"),
    [(path, variant) for path in FILES for variant in VARIANTS.get(path.stem, ("unlisted",))],
    ids=lambda value: getattr(value, "stem", value),
)
def test_each_variant_is_what_its_method_takes(path, variant):
    values = load_config(f"{path}:{variant}" if variant else str(path))
    method = cli.method_module(values["method"])
    if "method" not in method.Config.__dataclass_fields__:
        del values["method"]
    assert isinstance(to_dataclass(method.Config, values), method.Config)


@pytest.mark.parametrize(
    "variant",
    ["tiny,dataset=cifar10", "xl2,datset=cifar10", "xl2,path=", "xl2,photos", "base,dataset=a"],
)
def test_diffscalers_data_set_is_given_in_one_way(variant):
    with pytest.raises(ConfigError, match="expected xl2,dataset=NAME, xl2,path=FOLDER or base"):
        load_config(f"{FOLDER / 'diffscaler.py'}:{variant}")


def test_diffscalers_data_set_reaches_its_source():
    values = load_config(f"{FOLDER / 'diffscaler.py'}:xl2,dataset=oxford_flowers102")
    target = values["data"]["target"]
    assert (target["source"], target["name"]) == ("tfds", "oxford_flowers102")
    target = load_config(f"{FOLDER / 'diffscaler.py'}:xl2,path=photos/a")["data"]["target"]
    assert (target["source"], target["path"]) == ("folder", "photos/a")


@pytest.mark.parametrize("variant", ["paper", "paper,dataset=mnist", "paper,data=dtd"])
def test_a_data_set_of_the_paper_is_asked_for_by_name(variant):
    with pytest.raises(ConfigError, match="expected dataset= one of imagenet, caltech101, dtd"):
        load_config(f"{FOLDER / 'datadream.py'}:{variant}")


def test_the_papers_data_sets_have_its_words_and_are_not_tested_on_shots():
    """As the reference has them: its templates' words, 200 epochs, 100 for ImageNet."""
    for variant in VARIANTS["datadream"]:
        name = variant.removeprefix("paper,dataset=")
        if name == variant:
            continue
        values = load_config(f"{FOLDER / 'datadream.py'}:{variant}")
        assert default_template(values["data"]["name"]) == TEMPLATES[name]
        assert values["finetune"]["epochs"] == (100 if name == "imagenet" else 200)
        assert values["data"].get("test_split", "") != "train"
