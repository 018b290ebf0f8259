"""Tile configs: text, buckets, measured tables."""

import json

import pytest

from mogu_kernels import tuning
from mogu_kernels.tuning import TileConfig
from tests import cases


@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_a_config_prints_and_parses_as_itself(kernel):
    assert TileConfig.parse(str(cases.KERNELS[kernel])) == cases.KERNELS[kernel]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TileConfig.parse("fused:16x64"), "not of the form"),
        (lambda: TileConfig.parse("two_launch:16x64x16:g8:w4:s3:fast"), "not of the form"),
        (lambda: TileConfig("fast", 16, 16, 16), "'fast'"),  # pyright: ignore
        (lambda: TileConfig("fused", 16, 48, 16), "BLOCK_N=48"),
        (lambda: TileConfig("fused", 8, 16, 16), "BLOCK_M=8"),
        (lambda: TileConfig("fused", 16, 16, 16, num_stages=0), "num_stages=0"),
        (lambda: TileConfig("fused", 16, 16, 16, descriptors=True), "descriptors=True goes with"),
        (
            lambda: TileConfig("two_launch", 16, 16, 16, one_launch=True, pdl=True),
            "one_launch=True does not go with pdl=True",
        ),
    ],
)
def test_impossible_configs_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("target", tuning.TARGETS)
@pytest.mark.parametrize("op", ["mogu_linear", "gated_mlp"])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 128, 129, 5000])
def test_tiles_depend_on_the_bucket_alone(op, M, target):
    for dtype in cases.DTYPES:
        for rank_columns in (2, 16, 128):
            rest = (4096, 4096, rank_columns, dtype, target)
            bucket = tuning.bucket(M)
            assert tuning.tile_config(op, M, *rest) == tuning.tile_config(op, bucket, *rest)
        assert tuning.shrink_config(M, dtype, target) == tuning.shrink_config(bucket, dtype, target)


def test_up_to_128_tokens_take_one_launch_and_more_take_two():
    for target in tuning.TARGETS:
        for M in tuning.M_BUCKETS:
            config = tuning.tile_config("mogu_linear", M, 4096, 4096, 16, "bf16", target)
            assert config.kernel == ("fused" if M <= 128 else "two_launch")
            assert not config.one_launch


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of measured tables, and no memory of others."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def choose(M, N=4096):
    rest = (4096, 16, "bf16", "hopper", "Some GPU (80 GB)")
    return tuning.tile_config("mogu_linear", M, N, *rest)


def test_measured_tiles_come_first_from_the_nearest_bucket(tables):
    path = tuning.table_path("Some GPU (80 GB)", "bf16")
    assert path == tables / "Some_GPU_80_GB_" / "bf16.json"
    path.parent.mkdir()
    small, large = cases.FUSED, cases.PERSISTENT
    entry = {"16": str(small), "512": str(large)}
    path.write_text(json.dumps({"mogu_linear:4096x4096:r16": entry}))
    assert choose(1) == choose(64) == small
    assert choose(500) == choose(600) == large
    other = tuning.tile_config(
        "mogu_linear", 1, 512, 4096, 16, "bf16", "hopper", "Some GPU (80 GB)"
    )
    assert other == tuning.linear_heuristic(16, 16, "bf16", "hopper")


def test_without_a_table_one_warning_and_heuristic_tiles(tables, recwarn):
    assert choose(1) == tuning.linear_heuristic(16, 16, "bf16", "hopper")
    choose(4096)
    assert [str(w.message) for w in recwarn] == [
        "no tiles were measured for Some GPU (80 GB) in bf16: heuristic ones are used "
        "(`make tune` measures them)"
    ]
