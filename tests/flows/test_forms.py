"""The schemas from which the Prefect UI draws its run forms."""

import pytest
from prefect.utilities.callables import parameter_schema

from flows.benchmark import benchmark
from flows.evaluation import Evaluation
from flows.merge_and_evaluate import merge_and_evaluate
from flows.parameters import Bench
from flows.sweep import sweep
from merging_core.methods import METHODS

FORMS = [(benchmark, "Bench"), (merge_and_evaluate, "MergeAndEvaluate"), (sweep, "Sweep")]


@pytest.mark.parametrize(("flow", "model"), FORMS)
def test_every_field_of_the_form_has_a_title_and_a_text(flow, model):
    schema = parameter_schema(flow).model_dump_for_openapi()
    for name, definition in schema["definitions"].items():
        for field, shape in definition.get("properties", {}).items():
            assert shape.get("title") or "$ref" in shape, f"{name}.{field}"
            # A nested form of a dataclass shows the text of the form itself.
            nested = schema["definitions"].get(shape.get("$ref", "").rpartition("/")[2], {})
            assert shape.get("description") or nested.get("description"), f"{name}.{field}"
    assert model in schema["definitions"]


@pytest.mark.parametrize(("flow", "model"), FORMS)
def test_a_form_begins_with_what_it_is_about_and_ends_with_the_evaluation(flow, model):
    fields = list(parameter_schema(flow).model_dump_for_openapi()["definitions"][model]["properties"])
    assert fields[-6:] == list(Evaluation.model_fields)
    assert fields[0] in ("recipe", "title")


def test_the_choice_of_a_method_brings_its_own_settings():
    definitions = parameter_schema(benchmark).model_dump_for_openapi()["definitions"]
    methods = definitions["Bench"]["properties"]["methods"]["items"]
    assert set(methods["discriminator"]["mapping"]) == set(METHODS)
    assert definitions["RTsvm"]["properties"]["gamma"]["maximum"] == 1
    assert definitions["RTsvm"]["additionalProperties"] is False


def test_a_benchmark_gives_its_tokenizer_policy_to_every_recipe():
    plain = {"base": "b", "experts": [{"name": "a", "source": "s"}], "methods": [{"name": "linear"}, {"name": "ties"}]}
    for policy in (None, "base", "union"):
        candidates = Bench.model_validate(plain | {"tokenizer": policy}).candidates()
        assert {recipe.tokenizer for recipes in candidates.values() for recipe in recipes} == {policy}
