"""`tapfm embed`: a vector a slide; features that a slide encoder is not for are refused."""

import h5py
import numpy as np
import pytest
import torch

from slides.errors import FeatureFileError, SettingsError
from tapfm.cli import main
from tapfm.data.feature_files import read_scales, read_slide
from tapfm.frozen import slide_embeddings
from tapfm.slide_encoders.opened import open_slide_encoder
from tapfm.slide_encoders.registry import find
from tapfm.slide_model import model as models
from tapfm.slide_model.feature_encoder import FeatureEncoder
from tests.bags import tile_set
from tests.feature_folders import lattice, write_trident
from tests.slide_encoders.twins import write_madeleine, write_moozy

NAMES = ("a.1", "b")
TILES = {"a.1": 9, "b": 4}


def write_features(folder, dim=384, encoder="lunit-vits8", side0=448):
    rng = np.random.default_rng(0)
    for name in NAMES:
        z_TD = rng.standard_normal((TILES[name], dim)).astype(np.float32)
        path = write_trident(folder, name, z_TD, patch_size=224, patch_size_level0=side0)
        with h5py.File(path, "r+") as file:
            file["features"].attrs["encoder"] = encoder
            file["coords"][:] = lattice(TILES[name]) // 112 * side0
    return folder


@pytest.fixture
def files(tmp_path):
    """Tiles' features and a MOOZY of the published width."""
    write_moozy(tmp_path / "moozy.pt", width=768, layers=1)
    return write_features(tmp_path / "job" / "features_lunit"), tmp_path / "moozy.pt"


def embed(features, weights, *more, encoder="moozy"):
    return main(["embed", "--slide-encoder", encoder, "--weights", str(weights),
                 "--features", str(features), *more])  # fmt: skip


def test_a_vector_a_slide_which_is_kept_and_read_back_as_one_tile(files, capsys):
    features, weights = files
    out = features.parent / "slide_features_moozy"
    assert embed(features, weights) == 0
    assert "licence CC-BY-NC-SA-4.0; for 384 features of lunit_s8" in capsys.readouterr().err
    opened = open_slide_encoder(find("moozy"), weights, trust_code=False)
    for name in NAMES:
        found = read_slide(features, name, lambda: 0.25)
        vector = opened.encode(found.z_TD, torch.from_numpy(found.coords0), 448)
        again = read_slide(out, name, lambda: None)
        assert (again.z_TD.shape, again.coords0, again.encoder) == ((1, 768), None, "moozy")
        torch.testing.assert_close(again.z_TD[0], vector)
    before = (out / "b.h5").read_bytes()
    assert embed(features, weights) == 0
    assert "2 were there already" in capsys.readouterr().out
    assert (out / "b.h5").read_bytes() == before
    TILES["b"] = 5
    try:
        write_features(features)
    finally:
        TILES["b"] = 4
    assert embed(features, weights) == 0
    assert "1 were there already" in capsys.readouterr().out
    write_moozy(weights, width=768, layers=2)
    assert embed(features, weights) == 2
    assert "of other weights" in capsys.readouterr().err


def test_a_vector_with_places_beside_it_is_one_tile(tmp_path):
    """TRIDENT keeps the tiles' coordinates in its files of slides."""
    path = write_trident(tmp_path, "s", np.ones((3, 4), np.float32))
    with h5py.File(path, "r+") as file:
        del file["features"]
        file["features"] = np.arange(4, dtype=np.float32)
    found = read_slide(tmp_path, "s", lambda: 0.5)
    assert found.z_TD.tolist() == [[0, 1, 2, 3]]
    assert found.coords0 is None


WRONG = {
    "encoder": ({"encoder": "uni_v1"}, "has features of uni_v1, and moozy is for 384 features of"),
    "adapted": ({"encoder": "lunit_s8_1a2b3c4d"}, "has features of lunit_s8_1a2b3c4d"),
    "width": ({"dim": 8}, r"has 8 features a tile.*`tapfm features --model lunit_s8`"),
    "size": ({"side0": 2000}, "has tiles of 500 microns"),
}


@pytest.mark.parametrize("case", WRONG)
def test_features_that_it_is_not_for_are_refused(files, case):
    how, message = WRONG[case]
    opened = open_slide_encoder(find("moozy"), files[1], trust_code=False)
    folder = write_features(files[0].parent / case, **how)
    found = read_slide(folder, "b", lambda: 0.25)
    with pytest.raises(FeatureFileError, match=message):
        slide_embeddings.write_vector(folder / "v.h5", opened, found, "mark", 0.25)


def test_a_slide_that_fails_is_left_out_where_that_is_asked_for(files, tmp_path, capsys):
    features, weights = files
    (features / "b.h5").write_bytes(b"no h5")
    assert embed(features, weights, "--out", str(tmp_path / "o")) == 2
    assert "b: " in capsys.readouterr().err
    assert embed(features, weights, "--out", str(tmp_path / "o"), "--on-error", "skip") == 2
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["a.1.h5"]


def test_mistakes_are_one_line(tmp_path, files, capsys):
    for arguments, message in (
        (("gone", "w"), "gone has no .h5 or .pt file"),
        ((tmp_path / "job", tmp_path / "gone"), "has no .h5 or .pt file"),
        ((files[0], tmp_path / "gone"), "neither Madeleine's folder"),
    ):
        assert embed(*arguments) == 2
        assert message in capsys.readouterr().err
    assert embed(files[0], files[1], encoder="tiatn") == 2
    assert "Did you mean titan?" in capsys.readouterr().err


def test_madeleine_needs_no_places(tmp_path):
    write_madeleine(tmp_path / "m")
    opened = open_slide_encoder(find("madeleine"), tmp_path / "m", trust_code=False)
    assert opened.encode(torch.randn(5, 512), None, 1).shape == (512,)
    with pytest.raises(SettingsError, match="model gave numbers of shape"):
        opened.encode(torch.full((5, 512), torch.nan), None, 1)


def write_run(folder, name, encoder, dim, aggregator="gated"):
    """A run on features, as `tapfm fit` leaves it."""
    features = {"dim": dim, "scores": True, "coords": True, "encoder": encoder, "folder": "f"}
    config = models.ModelConfig(
        "features", aggregator, ("A",), 224, 0.5, strategy={"name": "frozen"}, features=features
    )
    torch.manual_seed(dim)
    model = models.SlideModel(config, FeatureEncoder(features))
    models.save(model, folder / name / "best.safetensors")
    return folder / name, model


def test_runs_are_slide_encoders_and_several_are_a_mixture_with_learned_gates(tmp_path, capsys):
    """Path-PKT's frozen sources: here of two tile encoders, each with its own columns."""
    made = {}
    for name, encoder, dim in (("brca", "uni_v1", 6), ("luad", "lunit-vits8", 4)):
        features = write_features(tmp_path / name / "features", dim=dim, encoder=encoder)
        run, made[name] = write_run(tmp_path / "runs", name, encoder, dim)
        out = str(tmp_path / f"slide_features_{name}")
        assert main(["embed", "--slide-encoder", str(run), "--features", str(features),
                     "--out", out]) == 0  # fmt: skip
    vectors = []
    for name, model in made.items():
        found = read_slide(tmp_path / name / "features", "b", lambda: 0.25)
        tiles = tile_set(found.z_TD, torch.zeros(len(found)))
        vectors.append(model.aggregator(tiles).embedding_E.detach())
    folders = [tmp_path / "slide_features_brca", tmp_path / "slide_features_luad"]
    both = read_scales(folders, "b", lambda: None)
    assert both.encoder == "brca, luad"
    torch.testing.assert_close(both.z_TD, torch.block_diag(*(each[None] for each in vectors)))
    # attention over the rows, then a linear layer: sum_i w_i W_i v_i
    w = torch.tensor([0.3, 0.7])
    weight = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    mixed = weight[:, :6] @ vectors[0] * w[0] + weight[:, 6:] @ vectors[1] * w[1]
    torch.testing.assert_close(weight @ (w @ both.z_TD), mixed)
    write_features(tmp_path / "tiles", dim=10)
    with pytest.raises(FeatureFileError, match="has no coordinates"):
        read_scales([folders[0], tmp_path / "tiles"], "b", lambda: None)
    brca, others = tmp_path / "runs" / "brca", tmp_path / "luad" / "features"
    more = ["--out", str(tmp_path / "o")]
    assert main(["embed", "--slide-encoder", str(brca), "--features", str(others), *more]) == 2
    assert "has features of lunit-vits8, and brca is for 6 features of uni_v1. Extract" in (
        capsys.readouterr().err
    )


def test_a_run_that_looks_at_scores_needs_them(tmp_path):
    run, _ = write_run(tmp_path, "scored", "", 4, "tapfm_gated")
    opened = slide_embeddings.open_any(str(run), None, False)
    features = write_features(tmp_path / "features", dim=4, encoder="any")
    found = read_slide(features, "b", lambda: 0.25)
    with pytest.raises(FeatureFileError, match="has no CLS scores, which scored looks at"):
        slide_embeddings.write_vector(tmp_path / "v.h5", opened, found, "mark", 0.25)
    score_T = torch.rand(len(found))
    one, other = (opened.encode(found.z_TD, None, 448, s) for s in (score_T, 9 * score_T.flip(0)))
    assert not torch.equal(one, other)
