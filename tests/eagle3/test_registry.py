"""Which class and which layer a draft's config means; unknown names list the known ones."""

import pytest

from aerie.eagle3.architectures import registered
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.registry import load_draft, register, resolve
from aerie.llama4.json_fields import CheckpointError

NAMES = {  # issue 7: the five that must be known, and the layer each stands for on its own
    "Eagle3Llama4ForCausalLM": "llama4",
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "Eagle3Speculator": "llama",
    "Eagle3DraftModel": "llama",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_decides_where_the_config_is_silent(name):
    found = resolve({"architectures": [name]})
    assert (found.draft_class, found.layer_kind) == (Eagle3Llama4ForCausalLM, NAMES[name])
    assert name in found.reason


@pytest.mark.parametrize(
    ("model_type", "kind"), [("llama", "llama"), ("llama4", "llama4"), ("llama4_text", "llama4")]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_config_decides_before_the_name(name, model_type, kind):
    found = resolve({"architectures": [name], "model_type": model_type})
    assert found.layer_kind == kind
    assert repr(model_type) in found.reason


def test_the_layer_of_a_speculators_file_is_described_inside():
    layer = {"model_type": "llama4_text"}
    values = {"speculators_model_type": "eagle3", "transformer_layer_config": layer}
    found = resolve({"architectures": ["Eagle3DraftModel"], **values})
    assert found.layer_kind == "llama4"


def test_a_plain_name_needs_a_sign_of_eagle3():
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert resolve({**plain, "draft_vocab_size": 8}).layer_kind == "llama"
    with pytest.raises(CheckpointError, match="draft_vocab_size"):
        resolve(plain)


@pytest.mark.parametrize("names", [["MedusaModel"], [], None], ids=str)
def test_unknown_names_list_the_known_ones(names):
    with pytest.raises(CheckpointError) as error:
        resolve({"architectures": names})
    assert all(name in str(error.value) for name in NAMES)
    assert not names or names[0] in str(error.value)


@pytest.fixture
def _no_name_stays():
    yield
    registered.clear()


@pytest.mark.usefixtures("_no_name_stays")
def test_users_register_their_own(tmp_path, draft_files, make_target):

    class Ours(Eagle3Llama4ForCausalLM):
        """A draft with another name."""

    files = draft_files("llama", architectures=["OursForCausalLM"])
    folder, target = files.write(tmp_path / "ours"), make_target()
    with pytest.raises(CheckpointError, match="OursForCausalLM"):
        load_draft(folder, target)
    register("OursForCausalLM", Ours)
    assert type(load_draft(folder, target)) is Ours
    with pytest.raises(CheckpointError, match="OursForCausalLM"):
        resolve({"architectures": ["Other"]})
    for taken in ("OursForCausalLM", "Eagle3LlamaForCausalLM"):
        with pytest.raises(ValueError, match="registered already"):
            register(taken, Ours)


@pytest.mark.usefixtures("_no_name_stays")
def test_an_own_name_must_say_its_layer():
    register("OursForCausalLM", Eagle3Llama4ForCausalLM)
    with pytest.raises(CheckpointError, match="'model_type'"):
        resolve({"architectures": ["OursForCausalLM"]})
