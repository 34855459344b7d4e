import json

import pytest
import torch
from tiny_checkpoints import CONFIG, assert_same_bits, llama, merged, read_folder, tuned, write_folder

from merging_core.checkpoint import Checkpoint, TensorInfo
from merging_core.compatibility import check_compatible, own_tensors, vocabulary
from merging_core.errors import IncompatibleError, MergeError
from merging_core.merge import Inputs, merge, merged_shards
from merging_core.methods import Linear
from merging_core.recipe import Expert, Recipe

TIED = CONFIG | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check(base, **experts):
    opened = {name: Checkpoint(folder, f"expert {name!r}") for name, folder in experts.items()}
    return check_compatible(Checkpoint(base, "the base"), opened)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_equal_layouts_give_the_tensors_as_the_base_stores_them(tmp_path):
    base = write_folder(tmp_path / "base", llama(dtype=torch.bfloat16))
    expert = write_folder(tmp_path / "expert", llama(1))
    expected = check(base, honest=expert)
    assert expected == {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in llama(dtype=torch.bfloat16).items()}


def test_all_mismatches_of_all_experts_stand_in_one_error(tmp_path):
    base = write_folder(tmp_path / "base", llama(), vocab={"a": 0, "b": 1})
    lacking = write_folder(tmp_path / "lacking", without(llama(), "model.scalar", "model.conv.weight"))
    extra = write_folder(tmp_path / "extra", llama() | {"added": torch.ones(1), "model.scalar": torch.ones(2)})
    other = write_folder(
        tmp_path / "other",
        llama(),
        config=CONFIG | {"num_attention_heads": 4, "model_type": "qwen2"},
        vocab={"a": 0, "c": 1},
    )
    with pytest.raises(IncompatibleError) as caught:
        check(base, helpful=lacking, honest=extra, harmless=other)
    message = str(caught.value)
    for part in (
        "expert 'helpful' lacks 2 tensors of the base, first ",
        "model.conv.weight",
        "expert 'honest' has 1 tensors that the base lacks, first added",
        "expert 'honest' has 1 tensors of another shape, first model.scalar [2] instead of []",
        "config.json of expert 'harmless' has num_attention_heads 4, that of the base 2",
        "config.json of expert 'harmless' has model_type qwen2, that of the base llama",
        "the vocabulary of expert 'harmless' differs in 2 tokens, first 'b', 'c'",
        "fine-tuned from the same base",
    ):
        assert part in message


def test_three_names_and_the_count_are_shown(tmp_path):
    base = write_folder(tmp_path / "base", {f"t{number}": torch.ones(1) for number in range(9)})
    expert = write_folder(tmp_path / "expert", {"t8": torch.ones(1)})
    with pytest.raises(IncompatibleError) as caught:
        check(base, honest=expert)
    assert "lacks 8 tensors" in str(caught.value)
    assert str(caught.value).count("t1") + str(caught.value).count("t7") == 1


@pytest.mark.parametrize(
    "key", ["model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"]
)
def test_each_entry_of_the_architecture_counts(tmp_path, key):
    base = write_folder(tmp_path / "base", llama(), config={key: 1})
    expert = write_folder(tmp_path / "expert", llama(), config={key: 2})
    with pytest.raises(IncompatibleError, match=f"has {key} 2, that of the base 1"):
        check(base, honest=expert)


def test_an_entry_that_one_config_leaves_out_is_not_compared(tmp_path):
    base = write_folder(tmp_path / "base", llama(), config={"head_dim": 64})
    assert check(base, honest=write_folder(tmp_path / "expert", llama(), config={}))


def test_entries_that_do_not_change_the_weights_are_not_compared(tmp_path):
    base = write_folder(tmp_path / "base", llama(), config=CONFIG | {"use_cache": True, "torch_dtype": "bfloat16"})
    assert check(base, honest=write_folder(tmp_path / "expert", llama(), config=CONFIG | {"use_cache": False}))


def test_nothing_is_written_when_checkpoints_do_not_fit(tmp_path):
    base = write_folder(tmp_path / "base", llama())
    expert = write_folder(tmp_path / "expert", without(llama(), "model.scalar"))
    (tmp_path / "out").mkdir()
    recipe = Recipe(base="b", experts=(Expert(name="honest", source="x"),), method=Linear())
    with pytest.raises(IncompatibleError):
        merge(recipe, Inputs(base=base, experts={"honest": expert}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_integer_tensor_in_place_of_a_float_is_refused(tmp_path):
    base = write_folder(tmp_path / "base", {"w": torch.ones(2, 2)})
    expert = write_folder(tmp_path / "expert", {"w": torch.ones(2, 2, dtype=torch.int8)})
    with pytest.raises(
        IncompatibleError,
        match=r"expert 'honest' has 1 tensors of another kind, first w torch.int8 instead of torch.float32",
    ):
        check(base, honest=expert)
    with pytest.raises(IncompatibleError, match=r"first w torch.float32 instead of torch.int8"):
        check(expert, honest=base)


# Vocabulary


def test_an_equal_vocabulary_in_another_order_is_fine(tmp_path):
    base = write_folder(tmp_path / "base", llama(), vocab={"a": 0, "b": 1})
    assert check(base, honest=write_folder(tmp_path / "expert", llama(), vocab={"b": 1, "a": 0}))


def test_equal_tokens_with_other_ids_are_refused(tmp_path):
    base = write_folder(tmp_path / "base", llama(), vocab={"a": 0, "b": 1})
    expert = write_folder(tmp_path / "expert", llama(), vocab={"a": 1, "b": 0})
    with pytest.raises(IncompatibleError, match="vocabulary of expert 'honest' differs in 2 tokens"):
        check(base, honest=expert)


def test_an_added_token_is_part_of_the_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<pad>", "id": 7}]})
    )
    assert vocabulary(tmp_path) == {"a": 0, "<pad>": 7}


def test_a_unigram_vocabulary_counts_positions(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}))
    assert vocabulary(tmp_path) == {"<unk>": 0, "a": 1}


def test_an_expert_without_a_tokenizer_is_accepted(tmp_path):
    base = write_folder(tmp_path / "base", llama(), vocab={"a": 0})
    assert check(base, honest=write_folder(tmp_path / "expert", llama()))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": {"vocab": 5}}', '{"model": null}'])
def test_a_damaged_tokenizer_is_an_error_of_ours_that_names_the_file(tmp_path, text):
    base = write_folder(tmp_path / "base", llama(), vocab={"a": 0})
    expert = write_folder(tmp_path / "expert", llama())
    (expert / "tokenizer.json").write_text(text)
    with pytest.raises(MergeError, match=r"tokenizer\.json"):
        check(base, honest=expert)


def test_tokens_beyond_ascii_are_compared(tmp_path):
    for name, token in (("base", "é中"), ("expert", "é国")):
        write_folder(tmp_path / name, llama())
        (tmp_path / name / "tokenizer.json").write_bytes(
            json.dumps({"model": {"vocab": {token: 0}}}, ensure_ascii=False).encode()
        )
    with pytest.raises(IncompatibleError, match="differs in 2 tokens"):
        check(tmp_path / "base", honest=tmp_path / "expert")


# The tied output head


def tied(seed=0, *, stored):
    tensors = llama(seed)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    return tensors if stored else without(tensors, HEAD)


@pytest.mark.parametrize("in_base", [True, False])
@pytest.mark.parametrize("in_expert", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_repeated_tied_head_is_left_out_wherever_it_is_stored(tmp_path, in_base, in_expert, shards):
    base = write_folder(tmp_path / "base", tied(stored=in_base), config=TIED, shards=shards)
    expert = write_folder(tmp_path / "expert", tied(1, stored=in_expert), config=TIED, shards=shards)
    assert HEAD not in check(base, honest=expert)
    assert EMBEDDING in check(base, honest=expert)


def test_a_merge_of_tied_models_leaves_the_head_to_the_loader():
    base, expert = tied(stored=True), tied(1, stored=False)
    assert_same_bits(merged(Linear(), base, [expert], config=TIED), expert)


def test_a_tied_head_that_differs_is_refused_whoever_holds_it(tmp_path):
    good = write_folder(tmp_path / "good", tied(stored=True), config=TIED)
    bad = write_folder(tmp_path / "bad", llama(), config=TIED)
    with pytest.raises(IncompatibleError, match=r"the base: config.json ties lm_head.weight to model.embed_tokens"):
        check(bad, honest=good)
    with pytest.raises(IncompatibleError, match=r"expert 'honest': config.json ties lm_head.weight"):
        check(good, honest=bad)


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    tensors = llama() | {HEAD: torch.ones(3, 3)}
    with pytest.raises(IncompatibleError, match="the two differ"):
        own_tensors(Checkpoint(write_folder(tmp_path, tensors, config=TIED)))


def test_an_untied_head_is_merged_like_any_matrix(tmp_path):
    base = write_folder(tmp_path / "base", llama(), config=CONFIG | {"tie_word_embeddings": False})
    expert = write_folder(tmp_path / "expert", llama(1), config=CONFIG | {"tie_word_embeddings": False})
    assert HEAD in check(base, honest=expert)


def test_one_tied_and_one_untied_model_are_refused(tmp_path):
    base = write_folder(tmp_path / "base", tied(stored=True), config=TIED)
    expert = write_folder(tmp_path / "expert", llama(), config=CONFIG | {"tie_word_embeddings": False})
    with pytest.raises(IncompatibleError, match="tie_word_embeddings False, that of the base True"):
        check(base, honest=expert)


def test_the_announced_size_is_what_is_written_when_a_tied_head_is_left_out(tmp_path):
    base = write_folder(tmp_path / "base", tied(stored=True), config=TIED)
    (tmp_path / "out").mkdir()
    recipe = Recipe(base="b", experts=(Expert(name="honest", source="x"),), method=Linear())
    sizes = []
    merge(recipe, Inputs(base=base, experts={"honest": base}), tmp_path / "out", sizes.append)
    assert merged_shards(recipe, Checkpoint(base)) == {"model.safetensors": sum(sizes)}
    assert HEAD not in read_folder(tmp_path / "out")


@pytest.mark.parametrize("stated", [{}, {"text_config": {"hidden_size": 12}}])
def test_a_head_that_repeats_the_embedding_is_left_out_where_the_architecture_ties_by_default(tmp_path, stated):
    config = CONFIG | stated
    base = write_folder(tmp_path / "base", tied(stored=False), config=config)
    assert HEAD not in check(base, honest=write_folder(tmp_path / "expert", tied(1, stored=True), config=config))
    for name, other in (("trained", config), ("untied", config | {"tie_word_embeddings": False})):
        tensors = llama(1) if name == "trained" else tied(1, stored=True)
        expert = write_folder(tmp_path / name, tensors, config=other)
        with pytest.raises(IncompatibleError, match=r"1 tensors that the base lacks, first lm_head\.weight"):
            check(base, honest=expert)


def test_a_tie_may_be_stated_of_the_nested_language_model(tmp_path):
    config = CONFIG | {"text_config": {"tie_word_embeddings": True}}
    base = write_folder(tmp_path / "base", tied(stored=True), config=config)
    assert HEAD not in check(base, honest=write_folder(tmp_path / "expert", tied(1, stored=True), config=config))


def test_a_tied_head_of_eight_bits_is_compared(tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tied(stored=True).items()}
    opened = Checkpoint(write_folder(tmp_path / "model", tensors, config=TIED))
    assert HEAD not in own_tensors(opened)


def test_the_nested_language_model_is_compared(tmp_path):
    nested = {"model_type": "gemma3_text", "num_attention_heads": 4, "rope_scaling": None}
    base = write_folder(tmp_path / "base", llama(), config={"model_type": "gemma3", "text_config": nested})
    other = nested | {"num_attention_heads": 8, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    expert = write_folder(tmp_path / "expert", llama(), config={"model_type": "gemma3", "text_config": other})
    with pytest.raises(IncompatibleError) as caught:
        check(base, honest=expert)
    assert "has num_attention_heads 8, that of the base 4" in str(caught.value)
    assert "has rope_scaling {'rope_type': 'yarn', 'factor': 4.0}" in str(caught.value)


# Quantized weights


@pytest.mark.parametrize("value", [{"bits": 4}, {"quant_method": "gptq"}])
def test_a_quantized_base_is_refused(tmp_path, value):
    base = write_folder(tmp_path / "base", llama(), config=CONFIG | {"quantization_config": value})
    with pytest.raises(IncompatibleError, match="the base: is quantized"):
        check(base, honest=write_folder(tmp_path / "expert", llama()))


def test_a_quantized_expert_is_refused_by_name(tmp_path):
    base = write_folder(tmp_path / "base", llama())
    expert = write_folder(tmp_path / "expert", llama(), config=CONFIG | {"quantization_config": {"bits": 4}})
    with pytest.raises(IncompatibleError, match="expert 'honest' has quantization_config set"):
        check(base, honest=expert)


def test_experts_fit_into_a_merge_when_only_dtypes_differ():
    base = llama(dtype=torch.bfloat16)
    experts = [tuned(llama(), 1), tuned(llama(dtype=torch.float16), 2)]
    result = merged(Linear(), base, experts)
    assert all(result[name].dtype == base[name].dtype for name in base)
