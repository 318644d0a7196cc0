import pytest

from acetate.data.splits import assign_splits, in_turns


def test_splits_hold_groups_together_and_stay():
    groups = {f"{name}-{form}": name for name in map(str, range(200)) for form in "ab"}
    splits = assign_splits(groups, 0.1)
    assert all(splits[f"{name}-a"] == splits[f"{name}-b"] for name in map(str, range(200)))
    assert 20 <= sum(split == "val" for split in splits.values()) <= 60
    grown = assign_splits(groups | {f"new-{i}": f"new-{i}" for i in range(50)}, 0.1)
    assert all(grown[key] == split for key, split in splits.items())


def test_splits_of_few_clips():
    for count in (2, 3, 5):
        values = assign_splits({str(i): str(i) for i in range(count)}, 0.01).values()
        assert {"train", "val"} == set(values)
    assert assign_splits({"a": "a", "b": "a"}, 0.5) == {"a": "train", "b": "train"}
    assert set(assign_splits({str(i): str(i) for i in range(20)}, 0.0).values()) == {"train"}
    assert set(assign_splits({str(i): str(i) for i in range(5)}, 0.999).values()) == {
        "train",
        "val",
    }
    with pytest.raises(ValueError, match=r"val_fraction=1\.0; must be in \[0, 1\)"):
        assign_splits({}, 1.0)


def test_kinds_take_turns():
    keys = ["smoke-003", "smoke-001", "fur_a", "Smoke-2", "glass-7", "fur_b", "12"]
    assert in_turns(keys, str) == [
        "smoke-003",
        "fur_a",
        "glass-7",
        "12",
        "smoke-001",
        "fur_b",
        "Smoke-2",
    ]
    assert in_turns(["clip03", "clip01"], str) == ["clip03", "clip01"]
    assert in_turns([], str) == []
