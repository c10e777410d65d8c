"""Where the loss of a mixture lies: sums over classes of suffixes are the sums over tokens."""

import pytest
import torch

from silo.readings import suffix_class


@pytest.fixture
def where(script):
    return script("where_loss_lies")


@pytest.fixture
def texts():
    """Two texts: how long a suffix of each token's context is known, whether one token always follows it, and what two
    contestants give to the token."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (50, 70):
        lengths = torch.randint(0, 12, (size,), generator=generator)
        single = torch.randint(0, 2, (size,), generator=generator)
        classes = torch.from_numpy(suffix_class(lengths.numpy())) * 2 + single
        logs = {name: torch.rand(size, generator=generator, dtype=torch.float64).log() for name in ("lm", "all")}
        made.append((lengths, classes, logs))
    return made


def test_each_token_is_counted_once_in_its_class(where, texts):
    """The classes' tokens and nats add up to the text's, and a class has what its lengths say."""
    lengths, classes, logs = texts[0]
    rows = where.by_suffix({"ngram_class": classes}, logs)
    assert sum(row["tokens"] for row in rows) == len(lengths)
    for name, each in logs.items():
        assert sum(row["tokens"] * row[name] for row in rows) == pytest.approx(-each.sum().item())
    (of_one,) = (row for row in rows if row["suffix"] == 1)
    assert of_one["tokens"] == int((lengths == 1).sum())
    assert of_one["lm"] == pytest.approx(-logs["lm"][lengths == 1].mean().item())


def test_several_texts_are_told_as_one(where, texts):
    """Merging the rows of texts gives the rows of all their tokens."""
    apart = [where.by_suffix({"ngram_class": classes}, logs) for _, classes, logs in texts]
    (_, one, of_one), (_, other, of_other) = texts
    logs = {name: torch.cat([of_one[name], of_other[name]]) for name in of_one}
    together = where.by_suffix({"ngram_class": torch.cat([one, other])}, logs)
    assert [pytest.approx(row) for row in together] == where.merged(apart)


def test_the_share_of_the_loss_is_that_of_the_last(where):
    """The table's last column tells of the contestant who is titled last."""
    rows = [
        {"suffix": 0, "tokens": 1, "lm": 8.0, "all": 6.0},
        {"suffix": 2, "tokens": 3, "lm": 8.0, "all": 2.0},
    ]
    told = where.table(rows, {"lm": "the model", "all": "the mixture"}).splitlines()
    assert told[0].endswith("| share of the loss of the mixture |")
    assert told[2:] == ["| none | 25.0 % | 8.00 | 6.00 | 50.0 % |", "| from 2 | 75.0 % | 8.00 | 2.00 | 50.0 % |"]
