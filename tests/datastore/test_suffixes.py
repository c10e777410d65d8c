"""The ∞-gram: equal to counting by hand, whatever the grouping, and to a store that never held what was removed."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datastore import kinds as remembered
from datastore import runs, suffixes
from datastore.group_texts import id_hash
from datastore.ngrams import Counts, NgramIndex
from datastore.shard import DocumentRow
from datastore.suffix_arrays import suffix_arrays
from datastore.suffixes import Suffixes
from silo.errors import UsageError

few = st.lists(st.integers(0, 3), min_size=1, max_size=12)
corpora = st.lists(few, min_size=1, max_size=8)
queries = st.lists(st.lists(st.integers(0, 4), max_size=14), min_size=1, max_size=3)


@dataclass
class Documents:
    """What a group of keys tells of its documents, without keys."""

    texts: list
    names: list
    first_row: int = 0
    dtype: type = np.uint16
    tokens: np.ndarray = field(init=False)
    begins: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)

    def __post_init__(self):
        self.tokens = np.asarray([token for text in self.texts for token in text], dtype=self.dtype)
        self.begins = np.cumsum([0, *map(len, self.texts)]).astype(np.int64)
        self.ids = np.asarray([id_hash(name) for name in self.names], dtype=np.uint64)

    def suffixes(self):
        """Them in order."""
        return Suffixes(self, *suffix_arrays(self.tokens, self.begins))

    def document(self, number):
        """A row of a shard, by its id alone."""
        return DocumentRow(self.names[number], "", "", "", "", "", 0, 0)


def index_of(texts, groups=1, dtype=np.uint16):
    """An index of texts, named by their numbers and dealt out to so many groups."""
    dealt, row = [], 0
    for group in range(groups):
        numbers = range(group, len(texts), groups)
        dealt.append(Documents([texts[n] for n in numbers], [str(n) for n in numbers], row, dtype))
        row += sum(len(text) for text in dealt[-1].texts)
    return NgramIndex([each.suffixes() for each in dealt if each.texts])


def match(index, *sequences):
    return index.match([np.asarray(sequence, dtype=np.int64) for sequence in sequences])


def counted(texts, context):
    """By hand: the length of the longest suffix of a context that goes on somewhere, and (next token, text) → count."""
    for length in range(len(context), -1, -1):
        if found := of_length(texts, context, length):
            return length, found
    return 0, Counter()


def everything(index, *sequences):
    """All that an index answers about some sequences, with documents by name."""
    found = match(index, *sequences)
    contexts = np.arange(len(found.lengths))
    following = found.following(contexts)
    asked = np.repeat(contexts, np.diff(following.begins))
    origins = found.origins(asked, following.tokens)
    cited = [index.document(at).id for at in origins.documents]
    arrays = (
        found.begins,
        found.lengths,
        found.counts,
        found.hits,
        found.single,
        *(getattr(following, n) for n in SPLIT),
    )
    return [array.tolist() for array in (*arrays, origins.begins, origins.counts)], cited


SPLIT = ("begins", "tokens", "counts")


def expected(texts, *sequences):
    """The same, by hand."""
    begins, lengths, counts, hits, single = [0], [], [], [], []
    split, tokens, token_counts = [0], [], []
    of_token, document_counts, cited = [0], [], []
    for sequence in sequences:
        for at in range(len(sequence) + 1):
            length, found = counted(texts, sequence[:at])
            lengths.append(length)
            counts.append(found.total())
            hits.append(sum(c for (token, _), c in found.items() if at < len(sequence) and token == sequence[at]))
            after = sorted({token for token, _ in found})
            single.append(after[0] if len(after) == 1 else -1)
            for token in after:
                names = sorted((str(n) for t, n in found if t == token), key=id_hash)
                tokens.append(token)
                token_counts.append(sum(c for (t, _), c in found.items() if t == token))
                cited += names
                document_counts += [found[token, int(name)] for name in names]
                of_token.append(len(cited))
            split.append(len(tokens))
        begins.append(len(lengths))
    return [begins, lengths, counts, hits, single, split, tokens, token_counts, of_token, document_counts], cited


@given(corpora, queries, st.integers(1, 3), st.sampled_from([np.uint16, np.uint32]))
@settings(deadline=None, max_examples=150)
def test_equals_counting_by_hand(texts, sequences, groups, dtype):
    """Lengths, counts, hits, what alone follows, distributions, documents are what counting by hand gives."""
    assert everything(index_of(texts, groups, dtype), *sequences) == expected(texts, *sequences)


def of_length(texts, context, length):
    """(next token, text) → count, after the last so many tokens of a context."""
    wanted = list(context[len(context) - length :])
    return Counter(
        (text[at + length], number)
        for number, text in enumerate(texts)
        for at in range(len(text) - length)
        if list(text[at : at + length]) == wanted
    )


@given(corpora, queries, st.integers(1, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_shorter_suffixes_equal_counting_by_hand(texts, sequences, length, groups):
    """Suffixes of one length are counted wherever the longest is longer: how often they occur, with which tokens after
    them, in which documents; and how many tokens come in one document alone."""
    index = index_of(texts, groups)
    matches = match(index, *sequences)
    shorter, contexts = matches.shorter(length), np.arange(len(matches.lengths))
    asked = [(sequence[:at], sequence[at : at + 1]) for sequence in sequences for at in range(len(sequence) + 1)]
    kinds, following = shorter.kinds(contexts), shorter.following(contexts)
    for number, (context, goes_on) in enumerate(asked):
        known = matches.lengths[number] > length
        found = of_length(texts, context, length) if known else Counter()
        after = Counter()
        for (token, _), times in found.items():
            after[token] += times
        hits = sum(after[token] for token in goes_on)
        assert (shorter.counts[number], shorter.hits[number]) == (found.total(), hits)
        assert kinds[number] == len(after)
        own = slice(*following.begins[number : number + 2])
        assert dict(zip(following.tokens[own].tolist(), following.counts[own].tolist(), strict=True)) == dict(after)
        of_tokens = shorter.occurrences(np.full(5, number), np.arange(5))
        assert of_tokens.tolist() == [after[token] for token in range(5)]
        assert spread_of(index, shorter, number) == spread_by_hand(found)


@given(corpora, queries, st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_where_the_longest_suffix_occurs(texts, sequences, groups):
    """Of the longest suffix, too, it is told in which documents it occurs, and how many tokens come after it."""
    index = index_of(texts, groups)
    matches = match(index, *sequences)
    contexts = [sequence[:at] for sequence in sequences for at in range(len(sequence) + 1)]
    kinds = matches.kinds(np.arange(len(contexts)))
    for number, context in enumerate(contexts):
        _, found = counted(texts, context)
        assert kinds[number] == len({token for token, _ in found})
        assert spread_of(index, matches, number) == spread_by_hand(found)


@given(corpora, queries, st.integers(1, 3), st.sampled_from([0, 3, 1 << 20]), st.data())
@settings(deadline=None, max_examples=80)
def test_what_is_remembered_is_what_would_be_counted(texts, sequences, groups, most, data):
    """One index that is asked again and again says what a new one says each time, whether it has room to remember, and
    so does a selection of its documents."""
    chosen = np.asarray(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    dealt = [chosen[group::groups] for group in range(groups) if len(chosen[group::groups])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "MOST", most)
        one = index_of(texts, groups)
        for index, fresh in ((one, lambda: index_of(texts, groups)), (one.select(dealt), lambda: one.select(dealt))):
            for sequence in (*sequences, *sequences):
                assert kinds_of(index, sequence) == kinds_of(fresh(), sequence)
            known = index._kinds._known[0].tolist()
            assert len(known) <= most
            assert known == sorted(set(known))


def kinds_of(index, sequence):
    """How many tokens come after the longest suffix of every context, and after its last one, two and three tokens."""
    matches = match(index, sequence)
    counts = [*(matches.shorter(length) for length in (1, 2, 3)), matches]
    return [each.kinds(np.arange(len(sequence) + 1)).tolist() for each in counts]


def test_short_suffixes_are_counted_once(monkeypatch):
    """What comes after one and two tokens is not counted again for the same words, in whatever text."""
    index, counted_now = index_of([[0, 1, 2, 0, 1, 3, 0, 2, 2, 1, 0, 1, 2, 3, 0, 1]], 1), []
    real = Counts._count_kinds
    monkeypatch.setattr(Counts, "_count_kinds", lambda self, which: counted_now.append(len(which)) or real(self, which))
    first = match(index, [0, 1, 2, 0, 1]).shorter(1)
    assert first.kinds(np.arange(6)).tolist() == [0, 0, 3, 4, 2, 3]
    assert sum(counted_now) == 3
    counted_now.clear()
    again = match(index, [2, 2, 1, 0, 1, 2, 0]).shorter(1)
    assert again.kinds(np.arange(8))[2:].tolist() == [4, 3, 2, 3, 4, 2]
    assert sum(counted_now) == 0


def spread_of(index, counts, context):
    """Document → (how often one context's suffix occurs, how many tokens come after it there alone)."""
    spread = counts.spread(context)
    names = [index.document(at).id for at in spread.documents]
    return dict(zip(names, zip(spread.counts.tolist(), spread.only.tolist(), strict=True), strict=True))


def spread_by_hand(found):
    """The same, of (next token, text) → count."""
    texts_of = {token: {number for t, number in found if t == token} for token, _ in found}
    return {
        str(number): (
            sum(times for (_, n), times in found.items() if n == number),
            sum(texts == {number} for texts in texts_of.values()),
        )
        for number in {number for _, number in found}
    }


@pytest.mark.parametrize("length", [0, 64, 65])
def test_suffixes_too_long_to_be_counted_are_refused(length):
    """Suffixes of one length are told up to the length that every run is compared to, and longer ones are an error."""
    text = list(range(70))
    matches = match(index_of([text], 1), text)
    assert matches.shorter(runs.FAR - 1).counts[runs.FAR :].tolist() == [1] * 6 + [0]
    with pytest.raises(UsageError, match="expected 1 to 63"):
        matches.shorter(length)


@given(corpora, queries)
@example([[0, 1, 0, 1, 0]], [[1, 0, 1, 0, 1]])
@settings(deadline=None, max_examples=50)
def test_long_runs_are_followed_to_their_ends(texts, sequences):
    """Runs longer than those compared at every place, and long documents, give what counting by hand does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FAR", 2)
        patch.setattr(suffixes, "APART", 2)
        assert everything(index_of(texts, 2), *sequences) == expected(texts, *sequences)


@pytest.mark.parametrize("far", [2, 64])
def test_documents_longer_than_lengths_are_kept(far, monkeypatch):
    """Of documents of more tokens than a byte counts, everything is as counted by hand, also where they end."""
    monkeypatch.setattr(runs, "FAR", far)
    texts = [[0, 1] * 140, [1, 0] * 129 + [2], [0, 1] * 128, [0] * 256 + [3], [0] * 255]
    sequences = [[0, 1] * 135 + [3], [0] * 257, [1, 0] * 128 + [2, 2]]
    assert everything(index_of(texts, 2), *sequences) == expected(texts, *sequences)


def test_what_damaged_files_say_is_not_followed():
    """Suffixes that would begin or end beyond all tokens are answered somehow, and no memory is read that is not
    theirs."""
    whole = Documents([[0, 1] * 140, [1, 0, 2]], ["a", "b"])
    rows, lengths = suffix_arrays(whole.tokens, whole.begins)
    for wrong in (rows + np.uint32(1 << 31), np.where(rows % 3, rows, np.uint32(0xFFFFFFFF)), rows):
        index = NgramIndex([Suffixes(whole, wrong, np.full_like(lengths, 255))])
        found = match(index, [0, 1] * 135)
        found.kinds(np.arange(271))
        found.following(np.arange(271))
        assert found.lengths.max() <= 271


@given(corpora, queries, st.data())
@settings(deadline=None, max_examples=80)
def test_a_selection_equals_an_index_of_it(texts, sequences, data):
    """Where only some documents count, everything is as in an index of these only, and the whole is as before."""
    kept = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    whole = index_of(texts, 2)
    chosen = [np.asarray([kept[int(group.document(n).id)] for n in range(len(group.ids))]) for group in whole.groups]
    names = [number for number, keep in enumerate(kept) if keep]
    found, cited = everything(whole.select(chosen), *sequences)
    wanted, by_number = expected([texts[n] for n in names], *sequences)
    assert Counter(cited) == Counter(str(names[int(number)]) for number in by_number)
    assert found[:7] == wanted[:7]
    assert everything(whole, *sequences) == expected(texts, *sequences)


@given(st.lists(few, min_size=2, max_size=8), st.data())
@settings(deadline=None, max_examples=80)
def test_taking_a_document_out_takes_its_entries_out(texts, data):
    """The arrays without a document are those with it, its entries cut out and the rows after it renumbered."""
    gone = data.draw(st.integers(0, len(texts) - 1))
    whole, rest = (Documents(each, list(map(str, each))) for each in (texts, texts[:gone] + texts[gone + 1 :]))
    (rows, lengths), (fewer, shorter) = (suffix_arrays(each.tokens, each.begins) for each in (whole, rest))
    begin, end = whole.begins[gone : gone + 2]
    kept = (rows < begin) | (rows >= end)
    assert np.where(rows >= end, rows - (end - begin), rows)[kept].tolist() == fewer.tolist()
    assert lengths[kept].tolist() == shorter.tolist()


@given(corpora, few, few)
@settings(deadline=None, max_examples=50)
def test_no_match_sees_the_future(texts, past, future):
    """What follows a context changes neither its match nor its count."""
    index = index_of(texts)
    short, long = match(index, past), match(index, past + future)
    assert long.lengths[: len(past) + 1].tolist() == short.lengths.tolist()
    assert long.counts[: len(past) + 1].tolist() == short.counts.tolist()


def test_no_match_crosses_a_document():
    """The first token of a document is not what follows the last one of the document before."""
    found = match(index_of([[1, 2], [3, 1], [2, 2]]), [1, 2, 3])
    assert found.lengths.tolist() == [0, 1, 1, 1]
    assert found.counts.tolist() == [6, 1, 1, 1]
    assert found.hits.tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("most", [70_000, (1 << 32) - 1])
def test_large_vocabularies(most):
    """Tokens beyond 16 bits are told apart, be there more of them than 16 bits count or only a few."""
    texts = [list(range(most - 66_000, most + 1)), [most, most - 65_536, most], [most, most, 5]]
    found = match(index_of(texts, 2, np.uint32), [most - 1, most, most, 5, most - 65_536, most])
    assert found.lengths.tolist() == [0, 1, 1, 2, 0, 1, 1]
    assert found.counts.tolist() == [66_007, 1, 3, 1, 66_007, 2, 3]
    assert found.hits.tolist() == [1, 1, 1, 1, 2, 1, 0]


def test_long_documents_that_come_twice():
    """Runs of hundreds of tokens are matched whole, and counted in each document that has them."""
    text = np.random.default_rng(0).integers(0, 3, 700).tolist()
    index = index_of([text, text[:600], text[100:]], 2)
    found = match(index, text)
    assert found.lengths[20:700].tolist() == list(range(20, 700))
    assert found.counts[300:600].tolist() == [2] * 300
    assert found.counts[600:700].tolist() == [1] * 100


def test_nothing_to_match_and_nothing_to_match_with():
    """No sequences give no contexts, and an index of no documents counts nothing."""
    assert everything(index_of([[1, 2]])) == ([[0], [], [], [], [], [0], [], [], [0], []], [])
    for index in (NgramIndex([]), index_of([[1, 2]]).select([np.asarray([False])])):
        found = match(index, [1, 2])
        assert [found.lengths.tolist(), found.counts.tolist(), found.hits.tolist()] == [[0, 0, 0]] * 3


def test_what_cannot_be_asked():
    """A token that no store of this type holds, and a selection for another number of groups, are refused."""
    index = index_of([[1, 2], [3]], 2)
    with pytest.raises(UsageError, match="token 65537 is not of the store's vocabulary"):
        match(index, [1, 65_537])
    with pytest.raises(UsageError, match="1 selections for 2 groups"):
        index.select([None])
