"""Each judge against its metric, with None where it has nothing to compare with."""

import jax
import numpy as np
import pytest
from flax import nnx

from kontext_jax.evaluation.judges import (
    Outputs,
    Scores,
)
from kontext_jax.evaluation.latent_statistics import code_usage
from kontext_jax.evaluation.network_judges import (
    ClipJudge,
    CodeJudge,
    DistanceJudge,
    FaceJudge,
    FeatureJudge,
    OcrJudge,
)
from kontext_jax.geometry import resize
from kontext_jax.metrics.frechet import frechet_distance
from kontext_jax.metrics.kernel import kernel_distance
from kontext_jax.metrics.similarity import clip_directional, cosine
from kontext_jax.models.autoencoder import Autoencoder, AutoencoderConfig, to_pixels
from kontext_jax.models.lpips import Lpips, LpipsConfig
from kontext_jax.types import Task
from tests.evaluation.fakes import (
    FakeClip,
    FakeFaces,
    FakeReader,
    Features,
    face,
    image,
    mesh_of,
    task,
)


def feature_outputs(name: str = "set", seed: int = 100, side: int = 16) -> Outputs:
    tasks = [
        task(image(0), image(10)),
        task(None, image(11)),
        task(image(2), image(12), image(99)),
        task(image(3)),
        task(image(4, 32, 32), image(14, 32, 32)),
    ]
    return Outputs(name, tasks, [image(seed + i, side, side) for i in range(5)])


def test_feature_scores_match_the_metrics():
    outputs, features = feature_outputs(), Features()
    columns, set_scores = FeatureJudge("net", features, kid="kid_net")(outputs)
    assert list(columns) == ["net", "net_context"]
    vectors = Features.of(outputs.images)
    for name, images, indices in (
        ("net", outputs.targets, [0, 2, 3, 4]),
        ("net_context", outputs.contexts, [0, 1, 2, 4]),
    ):
        others = Features.of([images[i] for i in indices])
        cosines = [columns[name][i] for i in indices]
        np.testing.assert_array_equal(cosines, cosine(vectors[indices], others))
        assert [columns[name][i] for i in range(5) if i not in indices] == [None]
        assert len(set(cosines)) == 4
    targets, ours = Features.of([outputs.targets[i] for i in (0, 2, 3, 4)]), vectors[[0, 2, 3, 4]]
    assert set_scores == {
        "fd_net": frechet_distance(targets, ours),
        "kid_net": kernel_distance(targets, ours)[0],
    }


def test_distances_use_the_last_image_of_each_session():
    """Sessions have one, two or three turns."""
    turns = {"a1": "", "a2": "a1", "b1": "", "c1": "", "c2": "c1", "c3": "c2"}
    tasks = [
        task(image(i), image(9))._replace(id=name, follows=before)
        for i, (name, before) in enumerate(turns.items())
    ]
    outputs = Outputs("set", tasks, [image(100 + i) for i in range(6)])
    _, set_scores = FeatureJudge("net", Features(), kid="kid_net")(outputs)
    targets, vectors = (
        Features.of([images[i] for i in (1, 2, 5)]) for images in (outputs.targets, outputs.images)
    )
    assert set_scores["fd_net"] == frechet_distance(targets, vectors)
    assert set_scores["kid_net"] == kernel_distance(targets, vectors)[0]


def test_a_feature_judge_with_distances_only():
    judge = FeatureJudge("inception", Features(), similarity="", fd="fid", kid="kid")
    columns, set_scores = judge(feature_outputs())
    assert columns == {} and list(set_scores) == ["fid", "kid"]
    one = Outputs("one", [task(image(0)), task()], [image(1), image(2)])
    assert judge(one) == Scores({}, {})
    same = [image(0), image(1)]
    columns, set_scores = judge(Outputs("same", [task(x) for x in same], same))
    assert set_scores["fid"] == pytest.approx(0, abs=1e-6)


def test_features_of_targets_and_contexts_are_computed_once():
    features = Features()
    judge = FeatureJudge("net", features, kid="kid_net")
    judge(feature_outputs())
    assert sorted(features.calls) == [4, 4, 5]  # targets, contexts, images
    features.calls.clear()
    second = feature_outputs(seed=200)
    scores = judge(second)
    assert features.calls == [5]
    assert scores == FeatureJudge("net", Features(), kid="kid_net")(second)
    for other in (feature_outputs("other set"), feature_outputs(side=24)):
        features.calls.clear()
        scores = judge(other)
        assert sorted(features.calls) == [4, 4, 5]
        assert scores == FeatureJudge("net", Features(), kid="kid_net")(other)


def test_feature_scores_are_none_without_targets_and_contexts():
    features = Features()
    outputs = Outputs("set", [task(), task()], [image(0), image(1)])
    columns, set_scores = FeatureJudge("net", features, kid="kid_net")(outputs)
    assert columns == {"net": [None, None], "net_context": [None, None]} and set_scores == {}
    assert features.calls == [2]


def clip_columns(tasks: list[Task], images: list[np.ndarray]) -> dict[str, list]:
    columns, set_scores = ClipJudge(FakeClip(None, None), mesh_of())(Outputs("set", tasks, images))
    assert list(columns) == ["clip_i", "clip_i_context", "clip_t", "clip_dir"] and set_scores == {}
    return columns


def test_clip_scores_match_the_metrics_for_every_mix_of_captions():
    before, after = "a cat at ease", "too big a tie"
    tasks = [
        task(image(0), image(10), source_caption=before, target_caption=after),
        task(None, image(11), source_caption=before),  # an instruction is not a caption
        task(None, image(12), target_caption=after),
        task(image(3), prompt="a boat on ice", category="text_to_image"),
        task(None, prompt="a boat", target_caption=after, source_caption=before),
        task(image(5), image(15), source_caption=after, target_caption=after),
        task(image(6), image(16), source_caption=after, target_caption=before),
        task(None, prompt="", category="text_to_image"),
    ]
    images = [image(100 + i) for i in range(8)]
    columns, vectors = clip_columns(tasks, images), Features.of(images)

    def cosines(name, others):
        values = [columns[name][i] for i in others]
        np.testing.assert_array_equal(
            values, cosine(vectors[list(others)], np.stack([*others.values()]))
        )
        assert [i for i in range(8) if columns[name][i] is not None] == list(others)

    cosines("clip_i", {i: Features.of([tasks[i].truth])[0] for i in (0, 3, 5, 6)})
    contexts = {i: Features.of([tasks[i].contexts[0]])[0] for i in (0, 1, 2, 5, 6)}
    cosines("clip_i_context", contexts)
    texts = {0: after, 2: after, 3: "a boat on ice", 4: after, 5: after, 6: before}
    cosines("clip_t", {i: FakeClip.of(text) for i, text in texts.items()})
    for i, change in ((0, (after, before)), (6, (before, after))):
        expected = clip_directional(
            vectors[i : i + 1], contexts[i][None], *(FakeClip.of(text)[None] for text in change)
        )
        assert columns["clip_dir"][i] == expected[0]
    assert [i for i in range(8) if columns["clip_dir"][i] is not None] == [0, 6]


def test_clip_scores_are_none_without_captions_targets_or_contexts():
    columns = clip_columns([task(image(0), image(1)), task(None, image(2))], [image(3), image(4)])
    assert columns["clip_t"] == columns["clip_dir"] == [None, None]
    assert columns["clip_i"][1] is None and None not in columns["clip_i_context"]
    columns = clip_columns([task(prompt="a boat")], [image(0)])
    assert columns["clip_i"] == columns["clip_i_context"] == columns["clip_dir"] == [None]
    assert columns["clip_t"][0] is not None


@pytest.fixture(scope="module")
def lpips(random_network):
    return random_network(lambda: Lpips(LpipsConfig(), rngs=nnx.Rngs(0)))


def test_lpips_scores_match_the_network(lpips):
    """With two sizes and a task without a target, on two devices."""
    tasks = [task(image(0, 32, 32)), task(), task(image(2, 64, 80)), task(image(3, 32, 32))]
    images = [image(4, 32, 32), image(5), image(6, 32, 40), tasks[3].truth]
    outputs = Outputs("set", tasks, images)
    columns, set_scores = DistanceJudge("lpips_alex", lpips, mesh_of(2))(outputs)
    assert list(columns) == ["lpips_alex"] and set_scores == {}
    column = columns["lpips_alex"]
    assert column[1] is None and column[3] == pytest.approx(0, abs=1e-6)
    direct = jax.jit(lambda net, a, b: net(to_pixels(a), to_pixels(b)))
    for i in (0, 2):
        expected = float(direct(lpips, images[i][None], outputs.targets[i][None])[0])
        assert column[i] == pytest.approx(expected, rel=1e-5) and abs(expected) > 1e-3
    assert len({column[0], column[2]}) == 2
    none = DistanceJudge("lpips_vgg", lpips, mesh_of())(Outputs("set", [task()], [image(0)]))
    small = Outputs("set", [task(image(0, 30, 32))], [image(1, 30, 32)])
    assert DistanceJudge("x", lpips, mesh_of())(small).columns == {"x": [None]}  # below 31 pixels
    assert none.columns == {"lpips_vgg": [None]}


def test_face_scores_are_none_without_a_face_in_the_context(cores):
    shared, nobody = face(100, 5, 0), face(0, 0, 0)
    tasks = [
        task(None, shared),
        task(None, nobody),
        task(None, shared, face(9, 9, 9)),
        task(None, shared),
        task(),
        task(None, nobody),
    ]
    encoder = FakeFaces()
    judge = FaceJudge(encoder)
    images = [face(1, 10 + i, 0) for i in range(6)]
    images[2] = face(0, 0, 0)
    scores = judge(Outputs("set", tasks, images))
    similarity = {"faces": [90.0, None, None, 87.0, None, None]}
    # A lost face counts in faces_found, not in the mean similarity.
    assert scores == Scores(similarity | {"faces_found": [1.0, None, 0.0, 1.0, None, None]})
    assert encoder.calls.count([100, 5, 0]) == encoder.calls.count([0, 0, 0]) - 1 == 1
    encoder.calls.clear()
    assert judge(Outputs("set", tasks, images)) == scores
    assert encoder.calls == [
        [1, 10, 0],
        [0, 0, 0],
        [1, 13, 0],
    ]  # contexts are cached
    # An image freed from memory may pass its id to another one, which must not hit the cache.
    for shade in range(1, 20):
        one = judge(Outputs("set", [task(None, face(shade, 0, 0))], [face(7, 1, 0)]))
        assert one.columns["faces"] == [shade - 1.0]


def test_ocr_scores_are_none_for_tasks_without_words(cores):
    tasks = [task(words="open"), task(), task(words="OPEN!"), task(words="open")]
    images = [face(1, 1, 1), face(1, 1, 1), face(1, 1, 1), face(0, 0, 0)]
    scores = OcrJudge(FakeReader())(Outputs("set", tasks, images))
    read = {"ocr_contains": [1.0, None, 0.0, 0.0]}
    assert scores == Scores(read | {"ocr_accuracy": [1.0, None, pytest.approx(0.8), 0.0]})


def test_codes_are_those_of_the_targets(random_network):
    """Also of a target whose sides are no multiples of a cell."""
    config = AutoencoderConfig(
        channels=4, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2,
        latent_channels=2, fsq_levels=(4, 2), remat="none",
    )  # fmt: skip
    network = random_network(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    targets = [image(0), image(1), None, image(2, 15, 17)]
    outputs = Outputs("set", [task(x) for x in targets], [image(9)] * 3 + [targets[3]])
    columns, set_scores = CodeJudge(network, mesh_of())(outputs)
    assert columns == {}
    sized = [*targets[:2], resize(targets[3], (16, 16))]
    codes = np.asarray(jax.jit(lambda net, x: net.codes(to_pixels(x)))(network, np.stack(sized)))
    expected = code_usage(codes.ravel(), 8)
    assert set_scores["bits_per_pixel"] == 3 / 4
    assert set_scores["code_usage"] == expected["used"] > 1 / 8
    assert set_scores["code_perplexity"] == expected["perplexity"]
    nothing = CodeJudge(network, mesh_of())(Outputs("set", [task()], [image(9)]))
    assert nothing == Scores({})
