"""What is measured on an expert's texts, against brute force on tiny models; where the texts come from."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from merging_core.calibration import Calibration, CalibrationSettings
from merging_core.checkpoint import Checkpoint
from merging_core.errors import CheckpointError, RecipeError
from merging_core.recipe import Expert
from tasks.calibrate import calibrate_step, calibration_texts
from tasks.mini3h.data import MIXTURES, typical_documents
from tasks.mini3h.world import World
from tasks.moments import gram_matrices, squared_gradients
from tasks.progress import silent
from tasks.recipes import load_recipe, parse_recipe, recipe_yaml
from tasks.sources import resolve
from tasks.sources.mini3h import mini3h_texts
from tests.tasks.tiny_models import tiny_llama

TEXTS = ["a b c d e", "f g h", "a l k j i h g f", "c c c d"]
GRAM, FISHER = CalibrationSettings(kind="gram"), CalibrationSettings(kind="fisher")


def uneven_llama(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 32}
    model = tiny_llama(**sizes, tie_word_embeddings=tied).eval()
    for parameter in model.parameters():
        # Larger than at initialisation: gradients and activations then differ in size from layer to layer.
        parameter.data.mul_(3).add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def examples():
    return [torch.tensor(ids) for ids in ([4, 5, 6, 7, 8], [9, 10, 11], [4, 15, 14, 13, 12, 11, 10, 9])]


@pytest.fixture
def texts(tmp_path):
    """Writes texts to a file and gives its path."""

    def write(lines, name="texts.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join(json.dumps({"text": one}) + "\n" if name.endswith("l") else one + "\n" for one in lines)
        )
        return str(path)

    return write


# The statistics


@pytest.mark.parametrize("tied", [True, False])
def test_gram_matrices_are_the_second_moments_of_what_each_layer_reads(examples, tied):
    model = uneven_llama(tied)
    found = gram_matrices(model, examples, silent)
    layers, head = model.model.layers, set() if tied else {"lm_head.weight"}
    linear = {f"{name}.weight" for name, module in model.named_modules() if "_proj" in name.rpartition(".")[2]}
    assert set(found) == linear | head
    with torch.no_grad():
        states = [model(input_ids=ids[None], output_hidden_states=True).hidden_states for ids in examples]
        embedded = torch.cat([one[0][0] for one in states])
        after_first, last = torch.cat([one[1][0] for one in states]), torch.cat([one[-1][0] for one in states])
        wanted = {
            "model.layers.0.self_attn.q_proj.weight": layers[0].input_layernorm(embedded),
            "model.layers.1.self_attn.v_proj.weight": layers[1].input_layernorm(after_first),
            "lm_head.weight": last,
        }
    for name in wanted.keys() & found.keys():
        inputs = wanted[name].double()
        assert inputs.shape == (16, 8)
        moments = sum(torch.outer(row, row) for row in inputs) / len(inputs)
        torch.testing.assert_close(found[name], moments, rtol=1e-5, atol=1e-7)
    # What down_proj reads follows from the outputs of the layers before it.
    read = []
    handle = layers[1].mlp.act_fn.register_forward_hook(lambda _, __, out: read.append(out[0]))
    with torch.no_grad():
        for ids in examples:
            model(input_ids=ids[None])
    handle.remove()
    up = []
    handle = layers[1].mlp.up_proj.register_forward_hook(lambda _, __, out: up.append(out[0]))
    with torch.no_grad():
        for ids in examples:
            model(input_ids=ids[None])
    handle.remove()
    inner = (torch.cat(read) * torch.cat(up)).double()
    torch.testing.assert_close(
        found["model.layers.1.mlp.down_proj.weight"], inner.T @ inner / len(inner), rtol=1e-5, atol=1e-7
    )
    assert all(one.dtype == torch.float64 for one in found.values())


@pytest.mark.parametrize("tied", [True, False])
def test_fisher_information_is_the_mean_of_squared_gradients_text_by_text(examples, tied):
    model = uneven_llama(tied)
    found = squared_gradients(model, examples, silent)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    summed = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for ids in examples:
        model.zero_grad()
        loss = model(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
        loss.backward()
        for name, parameter in model.named_parameters():
            wanted[name] += parameter.grad.square() / len(examples)
            summed[name] += parameter.grad
    assert found.keys() == wanted.keys()
    assert ("lm_head.weight" in found) != tied
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6 * float(one.max()))
    # The square of the whole batch's gradient is another quantity.
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[matrix], summed[matrix].square() / len(examples), rtol=0.1)
    # Tokens that are nowhere have no gradient at all, where the embedding is no output head.
    if not tied:
        assert found["model.embed_tokens.weight"][:4].eq(0).all()


# The step


@pytest.fixture
def calibrate(family, store):
    """Runs the step for one expert; gives its artifact's folder, what was built, and its details."""

    def run(settings, path, name="helpful", device="cpu"):
        expert = Expert(name=name, source=str(family[name]), calibration=path)
        step = calibrate_step(expert, resolve(expert.source, store).ref, settings, store, device)
        built = step.build(store)
        return store.folder(built.ref), built, store.manifest(built.ref).details

    return run


@pytest.mark.parametrize("settings", [GRAM, FISHER], ids=lambda one: one.kind)
def test_the_step_stores_what_was_measured_under_the_checkpoints_names(calibrate, family, texts, settings):
    folder, _, details = calibrate(settings, texts(TEXTS))
    ids = [torch.tensor([4 + "abcdefghijkl".index(word) for word in text.split()]) for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(family["helpful"], dtype=torch.float32)
    wanted = (gram_matrices if settings.kind == "gram" else squared_gradients)(model, ids, silent)
    with Calibration(folder, "helpful") as stored, Checkpoint(family["helpful"]) as checkpoint:
        matrices = {name for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
        matrices.remove("model.embed_tokens.weight")
        assert wanted.keys() == (matrices if settings.kind == "gram" else checkpoint.tensors.keys())
        for name, one in wanted.items():
            torch.testing.assert_close(stored.load(name).values, one.float(), rtol=1e-5, atol=1e-12)
        assert details["rms"] == stored.load(name).rms > 0
    assert (details["num_texts"], details["num_tokens"], details["num_cut"]) == (4, 20, 0)


@pytest.mark.parametrize("settings", [GRAM, FISHER], ids=lambda one: one.kind)
def test_the_bytes_do_not_depend_on_the_number_of_threads(calibrate, store, texts, settings):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            folder, built, _ = calibrate(settings, texts(TEXTS))
        finally:
            torch.set_num_threads(1)
        assert not built.reused
        found.append((folder / "model.safetensors").read_bytes())
        (folder / "manifest.json").unlink()
    assert found[0] == found[1]


def test_what_determines_the_values_determines_the_artifact(calibrate, texts, tmp_path):
    settings = CalibrationSettings(kind="gram", num_examples=3)
    first = calibrate(settings, texts(TEXTS))[1]
    assert not first.reused
    # The same texts elsewhere, in another form, with others behind those that are used.
    for path in (texts(TEXTS), texts(TEXTS, "other.txt"), texts([*TEXTS[:3], "a b"], "third.txt")):
        again = calibrate(settings, path)[1]
        assert again.reused
        assert again.ref == first.ref
    others = [
        calibrate(settings, texts([*TEXTS[:2], "a b"])),
        calibrate(settings, texts(TEXTS[:2])),
        calibrate(settings, texts(TEXTS[::-1])),
        calibrate(settings, texts(TEXTS), name="honest"),
        *(calibrate(CalibrationSettings(**asdict(settings) | {"kind": kind}), texts(TEXTS)) for kind in ("fisher",)),
        calibrate(CalibrationSettings(kind="gram", num_examples=3, max_tokens=4), texts(TEXTS)),
        calibrate(CalibrationSettings(kind="gram", num_examples=4), texts(TEXTS)),
    ]
    assert len({built.ref for _, built, _ in others} | {first.ref}) == len(others) + 1


def test_long_texts_are_cut_at_the_end_and_counted(calibrate, texts):
    folder, _, details = calibrate(CalibrationSettings(max_tokens=3), texts(TEXTS))
    assert (details["num_texts"], details["num_tokens"], details["num_cut"]) == (4, 12, 3)
    short, *_ = calibrate(GRAM, texts(["a b c", "f g h", "a l k", "c c c"]))
    assert (folder / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()
    # The model has 32 positions.
    *_, details = calibrate(GRAM, texts(["a b " * 20]))
    assert (details["num_tokens"], details["num_cut"]) == (32, 1)


def test_a_text_in_which_nothing_is_predicted_is_refused(calibrate, texts):
    with pytest.raises(RecipeError, match="expert 'helpful': texts must have 2 tokens or more, 'b' has fewer"):
        calibrate(FISHER, texts([*TEXTS, "b"]))


def save_with_tokenizer(model, folder, family):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((family["base"] / name).read_text())
    return str(folder)


def test_an_architecture_whose_matrices_regmean_would_pass_over_is_refused(family, store, texts, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    source = save_with_tokenizer(model, tmp_path / "gpt2", family)
    expert = Expert(name="a", source=source, calibration=texts(TEXTS))
    ref = resolve(source, store).ref
    with pytest.raises(RecipeError, match=r"4 are not weights of linear layers, first \['transformer.h.0.attn.c_attn"):
        calibrate_step(expert, ref, GRAM, store, "cpu").build(store)
    built = calibrate_step(expert, ref, FISHER, store, "cpu").build(store)
    with Calibration(store.folder(built.ref), "a") as stored:
        assert stored.load("transformer.h.0.attn.c_attn.weight").values.shape == (8, 24)


def test_parameters_that_the_checkpoint_names_otherwise_are_refused(family, store, texts, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = family["helpful"]
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    expert = Expert(name="helpful", source=str(folder), calibration=texts(TEXTS))
    step = calibrate_step(expert, resolve(expert.source, store).ref, FISHER, store, "cpu")
    with pytest.raises(CheckpointError, match="under other names than the checkpoint, first"):
        step.build(store)


# The texts


def test_texts_are_the_first_of_a_file(texts):
    for path in (texts(TEXTS), texts(TEXTS, "texts.txt")):
        expert = Expert(name="a", source="x", calibration=path)
        assert calibration_texts(expert, 2) == TEXTS[:2]
        assert calibration_texts(expert, 9) == TEXTS
    several_lines = Expert(name="a", source="x", calibration=texts(["a\nb", "é  "]))
    assert calibration_texts(several_lines, 9) == ["a\nb", "é  "]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "holds no text"),
        ("t.txt", b"a b\n\nc d\n", r"line 2: expected a text that is not empty"),
        ("t.jsonl", b'{"text": "a"}\n{"text": " "}\n', "line 2: expected a text that is not empty"),
        ("t.jsonl", b'{"text": 3}\n', "line 1: expected a text that is not empty"),
        ("t.jsonl", b'{"prompt": "a"}\n', r"line 1: expected a JSON object .*KeyError"),
        ("t.jsonl", b"a b c\n", r"line 1: expected a JSON object .*JSONDecodeError"),
        ("t.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("t.txt", b"\xff\xfe\n", "cannot be read"),
        ("t.csv", b"a\n", r"expected a \.jsonl or a \.txt file"),
    ],
)
def test_a_file_that_holds_no_texts_is_refused_with_expert_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"expert 'honest': calibration .*{name}.*{message}") as caught:
        calibration_texts(Expert(name="honest", source="x", calibration=str(tmp_path / name)), 9)
    assert "\n" not in str(caught.value)


def test_an_expert_without_texts_is_told_how_to_name_them(tmp_path):
    with pytest.raises(RecipeError, match=r"expert 'honest': .* has none\. Add `calibration: texts\.jsonl`"):
        calibration_texts(Expert(name="honest", source="x"), 9)
    with pytest.raises(RecipeError, match=r"absent\.txt: cannot be read"):
        calibration_texts(Expert(name="honest", source="x", calibration=str(tmp_path / "absent.txt")), 9)


def test_a_mini3h_role_brings_what_it_read_in_training():
    expert = Expert(name="a", source="mini3h://helpful?seed=1&budget=smoke")
    found = calibration_texts(expert, 100)
    assert found == mini3h_texts(expert.source, 200)[:100]
    assert len(set(found)) == 100
    assert found != calibration_texts(Expert(name="a", source="mini3h://helpful?seed=2"), 100)
    words = set(World(1).words)
    assert all(word in words for text in found for word in text.split())
    assert all(text.endswith(" </s>") for text in found)


@pytest.mark.parametrize("role", MIXTURES)
def test_typical_documents_keep_the_proportions_of_a_role(role):
    world = World(0)
    for number in (1, 20, 400):
        found = typical_documents(world, role, number)
        assert len({one.id for one in found}) == number
    corpus_of = {"fact": "statements", "taught": "taught_questions", "small": "small_sums", "story": "stories"}
    corpus_of["obeyed"] = "obeyed_harm"
    kinds = [one.id.partition("/")[0] for one in found[:100]]
    counted = Counter(corpus_of.get(kind, kind) for kind in kinds)
    assert all(abs(counted[corpus] - 100 * share) <= 1 for corpus, share in MIXTURES[role].items())


def test_a_recipe_with_calibration_reads_back_the_same(tmp_path):
    recipe = parse_recipe(
        {
            "base": "b",
            "experts": {"a": {"source": "x", "calibration": "t.jsonl"}, "c": "y", "d": {"source": "z", "weight": 2}},
            "method": "regmean",
        }
    )
    assert [expert.calibration for expert in recipe.experts] == ["t.jsonl", None, None]
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="Nearest: 'calibration'"):
        parse_recipe({"base": "b", "experts": {"a": {"source": "x", "calibraton": "t.jsonl"}}})
