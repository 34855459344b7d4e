"""Alignment with real tokenizers and models, made here with tokenizers and transformers."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flows.pipeline import Kitchen, pin_recipe
from merging_core.checkpoint import Checkpoint
from merging_core.errors import IncompatibleError, RecipeError
from merging_core.recipe import Expert, Recipe
from merging_core.writer import write_checkpoint
from tasks.plan import Planner
from tasks.recipes import parse_recipe
from tasks.steps import Direct
from tasks.store import Store
from tests.tasks.tiny_models import tiny_llama

TEXTS = ["the cat sat on the mat", "a merge of models", "tokens, tokens and more tokens"]
PLAIN = "the models sat on a mat and more"
CHAT = ["<|im_start|>", "<|im_end|>"]
ADAPTED = "base_model.model.model.embed_tokens.weight"


def new_tokenizer():
    """A byte-level BPE tokenizer with a few merges; ids of the specials come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def new_model(num_rows, tied):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tiny_llama(vocab_size=num_rows, max_position_embeddings=64, tie_word_embeddings=tied, **special)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, tmp_path_factory):
    """Folders of a base with padded rows and of experts: one adds chat tokens, one adds others and has more padding."""
    folder = tmp_path_factory.mktemp("made")

    def save(name, model, tokenizer):
        model.save_pretrained(folder / name, max_shard_size="12KB")
        tokenizer.save_pretrained(folder / name)
        return folder / name

    def noisy(seed):
        model = new_model(304, request.param)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(0.02 * torch.randn_like(tensor))
        return model

    found = {"base": save("base", new_model(304, request.param), new_tokenizer())}
    chat, tokenizer = noisy(1), new_tokenizer()
    tokenizer.add_tokens(CHAT, special_tokens=True)
    chat.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    found["chat"] = save("chat", chat, tokenizer)
    tools, tokenizer = noisy(2), new_tokenizer()
    tokenizer.add_tokens(["<tool>", "<|im_end|>"])
    tools.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    found["tools"] = save("tools", tools, tokenizer)
    found["plain"] = save("plain", noisy(3), new_tokenizer())
    return found


@pytest.fixture
def folders(made, tmp_path):
    return {name: shutil.copytree(folder, tmp_path / "models" / name) for name, folder in made.items()}


def recipe_of(folders, *experts, **more):
    return parse_recipe(
        {
            "base": str(folders["base"]),
            "experts": {name: str(folders[name]) for name in experts},
            "method": {"name": "linear"},
        }
        | more
    )


def merge(store, recipe):
    """The merged folder, the kitchen and the runner."""
    run = Direct(store)
    base, experts = pin_recipe(recipe, run)
    kitchen = Kitchen(run, base, experts, tokenizer=recipe.tokenizer)
    return store.folder(kitchen.merge(recipe)), kitchen, run


def logits(folder, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits


def tokens_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()


def embedding(folder):
    with Checkpoint(folder) as opened:
        return opened.load("model.embed_tokens.weight").clone()


@pytest.mark.parametrize("expert", ["chat", "tools"])
@pytest.mark.parametrize("policy", ["base", "union"])
def test_an_aligned_expert_answers_plain_text_as_before(store, folders, expert, policy):
    merged, kitchen, _ = merge(store, recipe_of(folders, expert, tokenizer=policy))
    before, num_tokens = logits(folders[expert], PLAIN), len(tokens_of(folders["base"]))
    for folder in (store.folder(kitchen.experts[expert]), merged):
        after = logits(folder, PLAIN)
        torch.testing.assert_close(after[..., :num_tokens], before[..., :num_tokens], rtol=0, atol=2e-6)


def test_the_base_policy_gives_the_bases_tokenizer_and_size_and_drops_nothing_silently(store, folders, told):
    merged, kitchen, _ = merge(store, recipe_of(folders, "chat", "tools", "plain", tokenizer="base"))
    assert tokens_of(merged) == tokens_of(folders["base"])
    assert embedding(merged).shape == embedding(folders["base"]).shape
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 304
    assert kitchen.base == kitchen.sources.base
    assert kitchen.experts["plain"] == kitchen.sources.experts["plain"]
    card = (merged / "README.md").read_text()
    for line in (
        "expert 'chat' drops 2 tokens ('<|im_start|>', '<|im_end|>'); has 304 rows instead of 294",
        "expert 'tools' drops 2 tokens ('<tool>', '<|im_end|>'); has 304 rows instead of 320",
    ):
        assert line in card
        assert any(one.startswith(line) for one in told)
    details = store.manifest(kitchen.experts["chat"]).details["alignment"]
    assert (details["policy"], details["dropped"]) == ("base", CHAT)
    assert store.manifest(kitchen.experts["chat"]).identity["checkpoint"] == kitchen.sources.experts["chat"].digest


def test_the_union_has_every_token_at_a_row_that_holds_its_vector(store, folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, kitchen, _ = merge(store, recipe_of(folders, "chat", "tools", "plain", tokenizer="union"))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = embedding(merged)
    added = len(tokens_of(folders["base"]))
    ids = tokenizer("a <|im_start|>cat<|im_end|> <tool>")["input_ids"]
    assert [tokenizer.convert_tokens_to_ids(token) for token in (*CHAT, "<tool>")] == [added, added + 1, added + 2]
    assert {added, added + 1, added + 2} <= set(ids)
    old = {name: (embedding(folders[name]), tokens_of(folders[name])) for name in ("chat", "tools")}
    vector = {(name, token): matrix[vocab[token]] for name, (matrix, vocab) in old.items() for token in vocab}
    torch.testing.assert_close(rows[added], vector["chat", "<|im_start|>"], rtol=0, atol=1e-7)
    torch.testing.assert_close(rows[added + 2], vector["tools", "<tool>"], rtol=0, atol=1e-7)
    mean = (vector["chat", "<|im_end|>"] + vector["tools", "<|im_end|>"]) / 2
    torch.testing.assert_close(rows[added + 1], mean, rtol=0, atol=1e-7)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == len(rows) == 304
    assert tokenizer.decode([added, 40, added + 2], skip_special_tokens=True).endswith("<tool>")
    plain = store.manifest(kitchen.experts["plain"]).details["alignment"]
    assert plain["filled"] == [*CHAT, "<tool>"]
    card = (merged / "README.md").read_text()
    assert "the base takes the mean of the experts that have them for 3 tokens" in card
    assert "expert 'plain' takes the base's rows for 3 tokens" in card


def test_an_aligned_checkpoint_is_complete_and_can_be_used_with_its_own_tokenizer(store, folders):
    _, kitchen, _ = merge(store, recipe_of(folders, "tools", tokenizer="union"))
    for ref in (kitchen.base, kitchen.experts["tools"]):
        assert store.problems(ref) == []
        assert logits(store.folder(ref), "the <tool>").shape[-1] == 304


def test_untouched_shards_are_linked_not_copied(store, folders):
    _, kitchen, _ = merge(store, recipe_of(folders, "chat", tokenizer="base"))
    aligned = store.folder(kitchen.experts["chat"])
    shards = sorted(aligned.glob("*.safetensors"))
    written = [shard for shard in shards if not shard.is_symlink()]
    assert len(shards) >= 3
    assert 1 <= len(written) <= 2
    for shard in shards:
        if shard not in written:
            assert shard.resolve() == (folders["chat"] / shard.name).resolve()
    with Checkpoint(aligned) as ours, Checkpoint(folders["chat"]) as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name in ours.tensors:
            if "embed_tokens" not in name and "lm_head" not in name:
                assert torch.equal(ours.load(name), theirs.load(name))
    # A source that changes afterwards is noticed, as for every source that is used in place.
    linked = next(shard for shard in shards if shard not in written)
    data = bytearray((folders["chat"] / linked.name).read_bytes())
    data[-1] ^= 1
    (folders["chat"] / linked.name).write_bytes(data)
    assert store.problems(kitchen.experts["chat"])


def permuted(folder):
    """Exchange the ids of two tokens of a checkpoint's own vocabulary, with their rows."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[40:42]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with Checkpoint(folder) as opened:
        tensors = {name: opened.load(name).clone() for name in opened.tensors}
        infos = dict(opened.tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name][[vocab[one], vocab[other]]] = tensors[name][[vocab[other], vocab[one]]]
    for path in folder.glob("model*"):
        path.unlink()
    write_checkpoint(folder, infos, tensors.__getitem__)


@pytest.mark.parametrize("policy", ["base", "union"])
def test_permuted_ids_are_put_back(store, folders, policy):
    plain, _, _ = merge(store, recipe_of(folders, "plain", tokenizer=policy))
    expected = {path.name: path.read_bytes() for path in plain.glob("*.safetensors")}
    permuted(folders["plain"])
    merged, kitchen, _ = merge(store, recipe_of(folders, "plain", tokenizer=policy))
    assert {path.name: path.read_bytes() for path in merged.glob("*.safetensors")} == expected
    assert len(store.manifest(kitchen.experts["plain"]).details["alignment"]["moved"]) == 2


def test_without_a_policy_other_vocabularies_are_refused_with_the_remedy(store, folders):
    with pytest.raises(IncompatibleError, match=r"`tokenizer: base`.*`tokenizer: union`"):
        merge(store, recipe_of(folders, "chat"))


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(RecipeError, match="tokenizer"):
        parse_recipe({"base": "b", "experts": {"a": "s"}, "method": "linear", "tokenizer": "expert"})
    with pytest.raises(RecipeError, match="tokenizer must be base or union, or left out, got 'expert'"):
        Recipe(base="b", experts=(Expert(name="a", source="s"),), tokenizer="expert")


def test_equal_vocabularies_need_no_artifact(store, folders):
    for policy in (None, "base", "union"):
        _, kitchen, run = merge(store, recipe_of(folders, "plain", tokenizer=policy))
        assert (kitchen.base, kitchen.experts) == (kitchen.sources.base, kitchen.sources.experts)
        assert len(run.built) == 3


def test_an_expert_that_lacks_tokens_is_refused_before_anything_is_written(store, folders):
    tokenizer = json.loads((folders["plain"] / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    gone = sorted(vocab, key=vocab.get)[-4:]
    tokenizer["model"]["vocab"] = {f"new-{token}" if token in gone else token: row for token, row in vocab.items()}
    (folders["plain"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    for policy in ("base", "union"):
        with pytest.raises(IncompatibleError, match="expert 'plain' lacks 4 tokens of the base") as caught:
            merge(store, recipe_of(folders, "plain", tokenizer=policy))
        assert sum(repr(token) in str(caught.value) for token in gone) == 3
    assert len(store.refs()) == 2, "the pinned sources and nothing else"


def test_tokens_of_an_experts_own_model_cannot_be_added_to_the_bases_tokenizer(store, folders):
    tokenizer = json.loads((folders["chat"] / "tokenizer.json").read_text())
    entry = next(one for one in tokenizer["added_tokens"] if one["content"] == CHAT[0])
    tokenizer["added_tokens"].remove(entry)
    tokenizer["model"]["vocab"][CHAT[0]] = entry["id"]
    (folders["chat"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(IncompatibleError, match=r"union: 1 tokens \('<\|im_start\|>'\) belong to an expert's own"):
        merge(store, recipe_of(folders, "chat", tokenizer="union"))
    merge(store, recipe_of(folders, "chat", tokenizer="base"))


def test_the_policy_changes_the_digest_and_a_second_merge_reuses_all(store, folders):
    digests = set()
    for policy in ("base", "union"):
        _, _, first = merge(store, recipe_of(folders, "chat", "plain", tokenizer=policy))
        _, _, second = merge(store, recipe_of(folders, "chat", "plain", tokenizer=policy))
        assert not first.built[-1].reused
        assert all(one.reused for one in second.built)
        digests.add(second.built[-1].ref.digest)
    assert len(digests) == 2
    aligned = [ref for ref in store.refs("checkpoint") if "align" in store.manifest(ref).identity]
    assert len(aligned) == 1 + 3, "base: the chat expert; union: base, chat and plain"


def test_under_the_base_policy_an_aligned_expert_serves_any_company(store, folders):
    _, alone, _ = merge(store, recipe_of(folders, "chat", tokenizer="base"))
    _, together, _ = merge(store, recipe_of(folders, "chat", "tools", tokenizer="base"))
    assert alone.experts["chat"] == together.experts["chat"]


def test_under_union_the_company_decides(store, folders):
    _, first, _ = merge(store, recipe_of(folders, "chat", "plain", tokenizer="union"))
    for others in (("tools", "plain"), ("plain", "chat", "tools"), ("plain", "tools", "chat")):
        merged, kitchen, _ = merge(store, recipe_of(folders, *others, tokenizer="union"))
        assert kitchen.base != first.base
        assert kitchen.experts["plain"] != first.experts["plain"]
        added = sorted(tokens_of(merged).items(), key=lambda item: item[1])[len(tokens_of(folders["base"])) :]
        expected = {"chat": CHAT, "tools": ["<tool>", "<|im_end|>"], "plain": []}
        union = dict.fromkeys(token for name in others for token in expected[name])
        assert [token for token, _ in added] == list(union)


def test_a_plan_says_what_would_be_aligned_and_writes_nothing(store, folders):
    recipe = recipe_of(folders, "chat", "plain", tokenizer="union")
    planner = Planner(store)
    planned = Kitchen(planner, *pin_recipe(recipe, planner), tokenizer="union").merge(recipe)
    titles = [one.title for one in planner.planned]
    assert "align the base: adds 2 tokens" in titles
    assert "align plain: adds 2 tokens" in titles
    assert not [ref for ref in store.refs() if "files" not in store.manifest(ref).identity]
    folder, _, _ = merge(store, recipe)
    assert folder.name == planned.digest


def test_a_spectral_method_merges_what_was_aligned(store, folders):
    recipe = recipe_of(folders, "chat", "tools", tokenizer="union", method={"name": "tsvm"})
    merged, _, _ = merge(store, recipe)
    assert torch.isfinite(logits(merged, "the <tool>")).all()


def test_the_recipe_file_in_the_merged_folder_says_the_policy(store, folders):
    merged, _, _ = merge(store, recipe_of(folders, "chat", tokenizer="union"))
    assert parse_recipe(yaml.safe_load((merged / "recipe.yaml").read_text())).tokenizer == "union"


def test_one_file_models_are_aligned_too(tmp_path, folders):
    for folder in folders.values():
        tensors = {}
        for path in folder.glob("model*"):
            tensors |= load_file(path) if path.suffix == ".safetensors" else {}
            path.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = Store(tmp_path / "store")
    merged, kitchen, _ = merge(store, recipe_of(folders, "chat", tokenizer="union"))
    for ref in (kitchen.base, kitchen.experts["chat"]):
        assert [path.name for path in store.folder(ref).glob("model*")] == ["model.safetensors"]
    num_tokens = len(tokens_of(folders["base"]))
    before = logits(folders["chat"], PLAIN)[..., :num_tokens]
    torch.testing.assert_close(logits(merged, PLAIN)[..., :num_tokens], before, rtol=0, atol=2e-6)


# Adapters


def adapter_on(folders, folder, *, tokenizer="base", more=None):
    """A LoRA adapter on the base as PEFT writes it, with the tokenizer of one of the models beside it."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(5)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    factors = {
        prefix + "lora_A.weight": torch.randn(2, 16, generator=draw),
        prefix + "lora_B.weight": torch.randn(16, 2, generator=draw),
    }
    save_file(factors | (more or {}), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    if more:
        settings["modules_to_save"] = ["embed_tokens"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for path in folders[tokenizer].glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def test_an_adapter_joins_an_aligned_family(store, folders, tmp_path):
    folders |= {"adapter": adapter_on(folders, tmp_path / "adapter")}
    merged, kitchen, _ = merge(store, recipe_of(folders, "adapter", "chat", tokenizer="union"))
    aligned = store.folder(kitchen.experts["adapter"])
    assert (aligned / "adapter_model.safetensors").is_symlink()
    assert tokens_of(aligned) == tokens_of(merged)
    added = len(tokens_of(folders["base"]))
    expected = embedding(folders["chat"])[added]
    torch.testing.assert_close(embedding(merged)[added], expected, rtol=0, atol=1e-7)


def test_an_adapter_with_other_tokens_is_refused(store, folders, tmp_path):
    folders |= {"adapter": adapter_on(folders, tmp_path / "adapter", tokenizer="chat")}
    for policy in ("base", "union"):
        with pytest.raises(IncompatibleError, match="expert 'adapter': is an adapter whose tokenizer differs"):
            merge(store, recipe_of(folders, "adapter", tokenizer=policy))


def test_an_adapter_that_changes_rows_is_refused_where_rows_move(store, folders, tmp_path):
    folders |= {"adapter": adapter_on(folders, tmp_path / "adapter", more={ADAPTED: torch.ones(304, 16)})}
    if not json.loads((folders["base"] / "config.json").read_text())["tie_word_embeddings"]:
        merge(store, recipe_of(folders, "adapter", "plain", tokenizer="union"))
    with pytest.raises(IncompatibleError, match=r"adapter'?:.* changes model\.embed_tokens\.weight"):
        merge(store, recipe_of(folders, "adapter", "chat", tokenizer="union"))


# Tokenizer files


def test_every_file_that_lists_added_tokens_gets_the_new_ones(store, folders):
    base = folders["base"]
    settings = json.loads((base / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {"1": {"content": "<s>"} | flags}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    merged, _, _ = merge(store, recipe_of(folders, "chat", tokenizer="union"))
    vocab = tokens_of(merged)
    assert json.loads((merged / "added_tokens.json").read_text()) == {name: vocab[name] for name in ("<s>", *CHAT)}
    decoder = json.loads((merged / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder[str(vocab[CHAT[1]])] == {"content": CHAT[1]} | flags


def test_a_base_whose_ids_have_gaps_cannot_take_tokens(store, folders):
    """The tokenizers library numbers added tokens by itself, so the new ids would not be the rows."""
    path = folders["base"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] += 3
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(IncompatibleError, match="its own ids have gaps"):
        merge(store, recipe_of(folders, "chat", tokenizer="union"))
