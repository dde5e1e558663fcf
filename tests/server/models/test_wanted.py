"""Configuration, registry and API say which models are wanted; the later in this row decides."""

from inferflux.config import ModelConfig
from inferflux.server.models.wanted import merge, with_loaded, with_unloaded, without
from inferflux.server.policy.document import LoadedModel, ModelChanges


def model(model_id: str, path: str = "p", *, default: bool = False) -> ModelConfig:
    return ModelConfig(id=model_id, path=path, default=default)


def test_an_id_is_what_the_last_says_of_it():
    changes = ModelChanges(loaded=(LoadedModel(id="c", path="api"), LoadedModel(id="d", path="api")))
    wanted = merge([model("a"), model("b")], [model("b", "registry"), model("c", "registry")], changes)
    found = {one: (said.origin, said.model.path) for one, said in wanted.models.items()}
    assert found == {"a": ("config", "p"), "b": ("registry", "registry"), "c": ("api", "api"), "d": ("api", "api")}


def test_what_the_api_unloaded_stays_away_until_it_is_loaded_again():
    changes = with_unloaded(ModelChanges(), "a", ["a", "b"])
    assert list(merge([model("a"), model("b")], [], changes).models) == ["b"]
    assert list(merge([], [model("a")], changes).models) == []
    again = with_loaded(changes, LoadedModel(id="a", path="x"), default=False)
    assert again.unloaded == ()
    assert merge([model("a")], [], again).models["a"].model.path == "x"


def test_unloading_what_no_file_asks_for_leaves_no_trace():
    changes = with_loaded(ModelChanges(), LoadedModel(id="x", path="x"), default=True)
    assert changes.default == "x"
    assert with_unloaded(changes, "x", ["a"]) == ModelChanges()


def test_what_is_forgotten_is_as_the_files_say():
    changes = with_unloaded(with_loaded(ModelChanges(), LoadedModel(id="a", path="x"), default=True), "b", ["b"])
    assert without(without(changes, "a"), "b") == ModelChanges(default="a")
    assert without(changes, "c") == changes


def test_who_is_the_default():
    configured, registered = [model("a"), model("b", default=True)], [model("c"), model("d", default=True)]
    assert merge(configured, registered, ModelChanges(default="a")).default == "a"
    assert merge(configured, registered, ModelChanges(default="gone")).default == "d"
    assert merge(configured, registered, ModelChanges(unloaded=("d",))).default == "b"
    assert merge(configured, [model("c")], ModelChanges()).default == "b"
    assert merge([model("a")], [], ModelChanges()).default == "a"
    assert merge([], [], ModelChanges()).default is None
    assert not any(one.model.default for one in merge(configured, registered, ModelChanges()).models.values())
