"""How two versions of an out are told apart: by tensor, key, row or byte, and how far."""

import json
import math

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.host.differences import differences
from stages.host.graph import files_of


@pytest.fixture
def both(tmp_path):
    """Two folders, and what differs between them."""
    folders = [tmp_path / "known", tmp_path / "found"]
    for folder in folders:
        folder.mkdir()
    return folders


def apart(both):
    return differences(*map(files_of, both))


def only(both):
    (difference,) = apart(both)
    return difference


def test_equal_folders_do_not_differ(both):
    for folder in both:
        (folder / "a.txt").write_text("same")
    assert apart(both) == []


def test_a_missing_a_new_and_a_changed_file_are_each_named(both):
    (both[0] / "gone.txt").write_text("a")
    (both[1] / "new.txt").write_text("a")
    for folder, text in zip(both, ("abcd", "abXd")):
        (folder / "changed.txt").write_text(text)
    told = {difference.file: difference.how for difference in apart(both)}
    assert told == {"gone.txt": "is missing", "new.txt": "is new", "changed.txt": "byte 2 is the first that differs"}


def test_a_longer_file_says_so(both):
    for folder, text in zip(both, ("abc", "abcd")):
        (folder / "a.bin").write_text(text)
    assert only(both).how == "byte 3 is the first that differs; it has 4 bytes, not 3"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tensor_is_named_with_its_distance(both, dtype):
    weights = {"a": np.ones((3, 4), dtype), "b": np.ones(16, dtype)}
    save_file(weights, both[0] / "model.safetensors")
    weights["b"] = weights["b"].copy()
    weights["b"][5] = 1.5
    save_file(weights, both[1] / "model.safetensors")
    found = only(both)
    assert found.how == "tensor b differs by 1.2e-01 of its norm"
    assert found.far == pytest.approx(0.5 / 4)


def test_bfloat16_is_compared_as_numbers(both):
    """One and the next bfloat16 after it, 1 + 2^-7, as their upper halves of 32-bit numbers."""
    for folder, word in zip(both, (0x3F80, 0x3F81)):
        header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
        content = len(header).to_bytes(8, "little") + header + word.to_bytes(2, "little")
        (folder / "model.safetensors").write_bytes(content)
    assert only(both).far == pytest.approx(2**-7)


def test_other_shapes_and_not_a_number_are_as_far_as_can_be(both):
    for folder, weights in zip(both, (np.ones(4, np.float32), np.full(4, np.nan, np.float32))):
        save_file({"a": weights}, folder / "model.safetensors")
    for folder, size in zip(both, (4, 5)):
        save_file({"a": np.ones(size, np.float32)}, folder / "shape.safetensors")
    assert [difference.far for difference in apart(both)] == [math.inf, math.inf]


@pytest.mark.parametrize("flipped", [8, 2000])
def test_a_flipped_bit_anywhere_in_a_tensor_file_is_seen(both, flipped):
    for folder in both:
        save_file({"a": np.ones(1000, np.float32)}, folder / "model.safetensors")
    content = bytearray((both[1] / "model.safetensors").read_bytes())
    content[flipped] ^= 1
    (both[1] / "model.safetensors").write_bytes(content)
    assert only(both).file == "model.safetensors"


def test_a_quantised_tensor_is_compared_as_the_numbers_it_stands_for(both):
    drawn = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    for folder, weights in zip(both, (drawn, drawn * np.float32(1.01))):
        writer = gguf.GGUFWriter(folder / "q8_0.gguf", "qwen2")
        writer.add_tensor("w", gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert only(both).far == pytest.approx(0.01, rel=0.2)


def test_a_json_key_is_named_with_both_values(both):
    for folder, value in zip(both, (0.5, 0.501)):
        (folder / "metrics.json").write_text(json.dumps({"models": {"qlora": {"n": 3, "pass_at_1": value}}}))
    found = only(both)
    assert found.how == "models.qlora.pass_at_1 is 0.501, not 0.5"
    assert found.far == pytest.approx(0.002)


@pytest.mark.parametrize(("known", "found"), [({"a": True}, {"a": 1}), ({"a": 1}, {}), ({"a": "x"}, {"a": "y"}), ([1], [1, 2])])
def test_more_than_a_number_is_as_far_as_can_be(both, known, found):
    for folder, value in zip(both, (known, found)):
        (folder / "a.json").write_text(json.dumps(value))
    assert only(both).far == math.inf


def test_a_row_is_named_by_number_and_id(both):
    rows = [{"id": f"test-{number}", "completion": "4"} for number in range(3)]
    for folder, completion in zip(both, ("4", "5")):
        rows[1]["completion"] = completion
        (folder / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert only(both).how == 'row 2 (test-1): completion is "5", not "4"'


def test_numbers_of_a_curve_are_compared_as_numbers(both):
    for folder, loss in zip(both, ("2.0", "2.002")):
        (folder / "sft.csv").write_text(f"step,loss\n1,{loss}\n2,1.5\n")
    found = only(both)
    assert found.how == "row 1: loss is 2.002, not 2.0" and found.far == pytest.approx(0.001)


def test_a_damaged_file_of_a_known_kind_is_said_to_be_unreadable(both):
    for folder, text in zip(both, ("{}", "{")):
        (folder / "a.json").write_text(text)
    found = only(both)
    assert found.how.startswith("cannot be read") and found.far == math.inf
