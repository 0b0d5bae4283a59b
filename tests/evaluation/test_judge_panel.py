"""A sweep gets the judges that it asks for, and a record that identifies them."""

import dataclasses
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from kontext_jax.evaluation import judge_panel
from kontext_jax.evaluation.judge_panel import JudgesConfig, make_judges
from kontext_jax.evaluation.judges import (
    Outputs,
    judge_drift,
    judge_pixels,
    judge_world,
    run_judges,
)
from kontext_jax.evaluation.scores import METRICS
from kontext_jax.files import sha256_of
from kontext_jax.metrics.faces import DETECTOR, RECOGNISER
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.similarity import cosine
from kontext_jax.models.lpips import Lpips, LpipsConfig
from kontext_jax.settings import to_dict
from kontext_jax.toy_data import world
from kontext_jax.weights import efficientnet, inception
from tests.evaluation.fakes import (
    FakeClip,
    FakeFaces,
    FakeReader,
    Features,
    mesh_of,
)


def test_lite0_is_left_out_if_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    panel = make_judges(JudgesConfig(), mesh_of())
    assert panel.judges == [judge_pixels, judge_world, judge_drift]
    assert list(panel.left_out) == ["efflite0"] and "not installed" in panel.left_out["efflite0"]
    assert panel.record["left_out"] == ["efflite0"] and panel.record["files"] == {}
    panel = make_judges(JudgesConfig(efflite0=False), mesh_of())
    assert len(panel.judges) == 3 and panel.left_out == {} and panel.record["left_out"] == []


@pytest.mark.parametrize("name", ["inception", "dino", "clip", "lpips", "auraface"])
def test_a_missing_path_is_an_error(tmp_path, name):
    config = JudgesConfig(efflite0=False, lpips_heads="heads", **{name: str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match="gone"):
        make_judges(config, mesh_of())


def test_a_folder_of_another_network_is_refused_as_dinov2(monkeypatch):
    class Other:
        config = LpipsConfig()

    monkeypatch.setattr(judge_panel, "open_folder", lambda folder: Other)
    with pytest.raises(ValueError, match="judges.dino: some/folder holds a network other"):
        make_judges(JudgesConfig(efflite0=False, dino="some/folder"), mesh_of())


def test_an_invalid_setting_is_named():
    with pytest.raises(ValueError, match="lpips_net 'squeeze' is not one of alex, vgg"):
        JudgesConfig(lpips_net="squeeze")
    with pytest.raises(ValueError, match="judges.distance needs EfficientNet-Lite0"):
        JudgesConfig(efflite0=False, distance=True)


@pytest.fixture
def all_judges(request, monkeypatch, random_network, tmp_path) -> JudgesConfig:
    """A config with all judges. Each fake network is the number that its file holds."""
    net = getattr(request, "param", "alex")
    lpips = random_network(lambda: Lpips(LpipsConfig(net=net), rngs=nnx.Rngs(0)))

    class Dlib(FakeFaces):
        metric = "dlib_similarity"

    class Aura(FakeFaces):
        metric = "auraface"

        def __init__(self, folder):
            super().__init__()

    def number(path: Path | str) -> dict[str, np.ndarray]:
        is_file = Path(path).is_file()
        return {"number": np.array(float(Path(path).read_text()) if is_file else 0.0)}

    def load_lpips(backbone, heads, trunk, mesh):
        assert trunk == net
        changed = number(backbone)["number"] + number(heads)["number"]
        return jax.tree.map(lambda x: x + changed.astype(x.dtype), lpips)

    for i, name in enumerate(("efflite0", "inception", "dino", "clip", "lpips", "lpips_heads")):
        (tmp_path / name).write_text(str(i))
    for name in (DETECTOR, RECOGNISER):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(
        judge_panel, "load_lite0", lambda mesh, config: number(tmp_path / "efflite0")
    )
    monkeypatch.setattr(judge_panel, "load_inception", lambda path, mesh: number(path))
    monkeypatch.setattr(judge_panel, "_load_dino", lambda path, mesh: number(path))
    monkeypatch.setattr(judge_panel, "load_clip", lambda path, mesh: FakeClip(number(path), None))
    monkeypatch.setattr(judge_panel, "load_lpips", load_lpips)
    monkeypatch.setattr(judge_panel, "load_distance", lambda config, mesh: lpips)
    monkeypatch.setattr(judge_panel, "AuraFace", Aura)
    monkeypatch.setattr(judge_panel, "DlibFaces", Dlib)
    monkeypatch.setattr(judge_panel, "Reader", FakeReader)
    monkeypatch.setattr(judge_panel, "pooled_features", features_of)
    names = ("inception", "dino", "clip", "lpips", "lpips_heads")
    paths = {name: str(tmp_path / name) for name in names}
    more = dict(auraface=str(tmp_path), distance=True, dlib=True, ocr=True)
    return JudgesConfig(**paths, **more, lpips_net=net)


def features_of(network, images, mesh=None) -> np.ndarray:
    return network["number"].astype(np.float32) + Features.of(images)


@pytest.mark.parametrize("all_judges", ["alex", "vgg"], indirect=True)
def test_judges_return_exactly_the_known_metrics(all_judges, monkeypatch):
    """Each comes from the network that it is named after."""
    other = {"lpips_vgg", "fid", "kid"}
    codes = {"bits_per_pixel", "code_usage", "code_perplexity"}  # of a cell's own judge
    if all_judges.lpips_net == "vgg":  # and FID's own file, so that every name occurs once
        other = {"lpips_alex", "fd_inception", "kid_inception"}
        monkeypatch.setattr(inception, "FID_SHA256", sha256_of(Path(all_judges.inception)))
    panel = make_judges(all_judges, mesh_of())
    assert panel.left_out == {}
    tasks = list(world.sessions(3, turns=1))
    words = dict(words="OPEN", source_caption="a cat", target_caption="too big")
    outputs = Outputs("set", [task._replace(**words) for task in tasks], [t.truth for t in tasks])
    columns, set_scores = run_judges(panel.judges, outputs)
    returned = [*columns, *set_scores]
    known = [name for name in METRICS if name not in other | codes]
    assert sorted(returned) == sorted(known) and other < METRICS.keys()
    assert known[-len(set_scores) :] == [name for name in known if name in set_scores]
    images = np.stack([task.contexts[0] for task in tasks])
    columns, set_scores = run_judges(panel.judges, Outputs("set", outputs.tasks, list(images)))
    for name, value in (("efflite0", 0.0), ("dinov2", 2.0)):
        network = {"number": np.array(value)}
        expected = cosine(features_of(network, images), features_of(network, outputs.targets))
        np.testing.assert_array_equal(columns[name], expected)
    network = {"number": np.array(1.0)}
    distance = frechet_distance(features_of(network, outputs.targets), features_of(network, images))
    assert set_scores["fid" if "fid" in known else "fd_inception"] == distance


def test_the_record_changes_with_the_content_of_any_file(all_judges, tmp_path):
    """Scores by the old file must not pass for scores by the new one."""
    folder = tmp_path / "clip_folder"
    folder.mkdir()
    inside = [folder / name for name in ("a.safetensors", "b.safetensors", "config.json", "c.txt")]
    names = ("inception", "dino", "lpips", "lpips_heads", "clip")
    files = [*inside, *(tmp_path / name for name in (*names[:-1], DETECTOR, RECOGNISER))]
    for file in (*inside, folder / "README.md"):
        file.write_text("0")
    config = dataclasses.replace(all_judges, clip=str(folder))
    before = make_judges(config, mesh_of()).record
    assert json.loads(json.dumps(before)) == before == make_judges(config, mesh_of()).record
    assert before["files"].keys() == set(map(str, files))
    for file in files:
        kept = file.read_text()
        file.write_text("77")
        after = make_judges(config, mesh_of()).record
        changed = {name for name, value in after["files"].items() if value != before["files"][name]}
        assert changed == {str(file)} and after | {"files": before["files"]} == before
        file.write_text(kept)
    (folder / "README.md").write_text("1")
    assert make_judges(config, mesh_of()).record == before


def test_the_record_holds_version_config_and_packages(all_judges, monkeypatch):
    record = make_judges(all_judges, mesh_of()).record
    with monkeypatch.context() as patch:
        patch.setattr(judge_panel, "VERSION", record["version"] + 1)
        assert make_judges(all_judges, mesh_of()).record != record
    assert record["config"] == to_dict(all_judges) and record["left_out"] == []
    versions = {"dlib-bin": "20.0.1", "rapidocr-onnxruntime": "1.4.4"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(judge_panel.importlib.metadata, "version", version)
    assert make_judges(all_judges, mesh_of()).record["packages"] == versions
    without = dataclasses.replace(all_judges, dlib=False, ocr=False)
    assert make_judges(without, mesh_of()).record["packages"] == {}
    versions["lpips"] = "0.1.4"
    assert make_judges(without, mesh_of()).record["packages"] == {}
    without = dataclasses.replace(without, lpips_heads="")
    assert make_judges(without, mesh_of()).record["packages"] == {"lpips": "0.1.4"}
