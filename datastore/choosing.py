"""The inner loops of a search for neighbours, compiled (:mod:`silo.compiling`)."""

from __future__ import annotations

import numpy as np

from silo.compiling import Function, compiled

SAMPLED = 64
"""Values that say in what range to look for the k-th smallest."""
FARTHEST = np.float32(np.finfo(np.float32).max)
"""The largest distance; what is not there is infinitely far."""
_TURNED = np.uint8(128)
_SIGN = np.uint32(1 << 31)
_ALL = np.uint32(0xFFFFFFFF)


def _exact(function: Function) -> Function:
    """One whose sums are exact in any order: of whole numbers up to 2 ^ 24, or 2 ^ 53 in float64."""
    return compiled(function, fastmath={"reassoc", "contract"})


@compiled
def decode(codes: np.ndarray, into: np.ndarray) -> None:
    """Write codes (n, dimension) uint8 less 128 as float32."""
    for key in range(len(codes)):
        for at in range(codes.shape[1]):
            into[key, at] = np.float32(np.int8(codes[key, at] ^ _TURNED))


@_exact
def whole_products(weights: np.ndarray, codes: np.ndarray, into: np.ndarray) -> None:
    """Write the products (n,) of whole numbers (dimension,) float32 with n codes, end to end, uint8 less 128."""
    for key in range(len(into)):
        total = np.float32(0)
        for at in range(len(weights)):
            total += weights[at] * np.float32(np.int8(codes[key * len(weights) + at] ^ _TURNED))
        into[key] = total


@compiled
def products_of_pairs(weights: np.ndarray, codes: np.ndarray, into: np.ndarray) -> None:
    """The same for weights (m, dimension) with codes (m, n · dimension) of their own: (m, n)."""
    for query in range(len(weights)):
        whole_products(weights[query], codes[query], into[query])


@_exact
def whole_squares(weights: np.ndarray, codes: np.ndarray, into: np.ndarray) -> None:
    """Write the sums (n,) of whole numbers (dimension,) float64 times the squares of codes (n, dimension) uint8 less
    128."""
    for key in range(len(codes)):
        total = np.float64(0)
        for at in range(codes.shape[1]):
            code = np.float64(np.int8(codes[key, at] ^ _TURNED))
            total += weights[at] * (code * code)
        into[key] = total


@compiled
def nearest_centroids(
    products: np.ndarray,
    squares: np.ndarray,
    rounding: np.ndarray,
    keys: np.ndarray,
    centroids: np.ndarray,
    squared: float,
    into: np.ndarray,
) -> None:
    """Write which few of n centroids are nearest to each of m keys, in any order; of equally near ones the first.

    Where rounding might have changed which they are, those that it might be are measured once more, in float64 and
    term by term, which gives the same on every processor.

    Args:
        products: (m, n) float32, of the keys with the centroids.
        squares: (n,) float32, what is added to −2 times a product.
        rounding: (m,) float64, by how much two distances of a key may seem to differ otherwise than they do.
        keys: (m, dimension) float32.
        centroids: (n, dimension) float32.
        squared: how many times ``squares`` has the centroids' squares: 1 for L2, 0 for an inner product.
        into: (m, few) int64, fewer than n. Of a key whose distances are no numbers, the first few.
    """
    few = into.shape[1]
    near, numbers = np.empty(few + 1), np.empty(few + 1, dtype=np.int64)
    for key in range(len(into)):
        near[:] = np.inf
        for centroid in range(len(squares)):
            distance = squares[centroid] - np.float32(2) * products[key, centroid]
            if distance < near[few]:
                _keep(distance, centroid, near, numbers)
        if near[few] - near[few - 1] <= rounding[key]:
            limit = near[few - 1] + rounding[key]
            near[:] = np.inf
            for centroid in range(len(squares)):
                if squares[centroid] - np.float32(2) * products[key, centroid] <= limit:
                    _keep(_measured(keys[key], centroids[centroid], squared), centroid, near, numbers)
        for at in range(few):
            into[key, at] = numbers[at] if np.isfinite(near[few - 1]) else at


@compiled
def _keep(distance: float, number: int, near: np.ndarray, numbers: np.ndarray) -> None:
    """Put a distance where it belongs among the nearest so far (few,), which are in order, if it is one of them."""
    at = len(near) - 1
    if not distance < near[at]:
        return
    while at and distance < near[at - 1]:
        near[at], numbers[at] = near[at - 1], numbers[at - 1]
        at -= 1
    near[at], numbers[at] = distance, number


@compiled
def _measured(key: np.ndarray, centroid: np.ndarray, squared: float) -> float:
    """The distance, less the key's own square."""
    total = 0.0
    for at in range(len(key)):
        total += np.float64(centroid[at]) * (squared * np.float64(centroid[at]) - 2.0 * np.float64(key[at]))
    return total


@compiled
def look_up(rows: np.ndarray, first: int, values: np.ndarray, into: np.ndarray) -> None:
    """Write the values (m,) of those rows (n,) that are among the m from ``first`` on; others (n,) stay as they are."""
    for at in range(len(rows)):
        if first <= rows[at] < first + len(values):
            into[at] = values[rows[at] - first]


@compiled
def _finish(
    products: np.ndarray, unit: np.float32, constant: np.float32, squares: np.ndarray, lowest: np.float32
) -> None:
    """Make the products (n,) of one query distances."""
    for key in range(len(products)):
        products[key] = max(products[key] * unit + squares[key] + constant, lowest)


@compiled
def finish_pairs(
    products: np.ndarray, units: np.ndarray, constants: np.ndarray, squares: np.ndarray, lowest: np.float32
) -> None:
    """Make products (m, n) of m queries with n keys each, which have squares (m, n), distances."""
    for query in range(len(products)):
        _finish(products[query], units[query], constants[query], squares[query], lowest)


@compiled
def _count(values: np.ndarray, most: np.float32) -> np.int32:
    """How many of (n,) values are not above a number."""
    count = np.int32(0)
    for at in range(len(values)):  # so and in 32 bits, or no vectors are made of it
        count = np.int32(count + (np.int32(1) if values[at] <= most else np.int32(0)))
    return count


@compiled
def _within(values: np.ndarray, most: np.float32, k: int) -> np.float32:
    """A number that at least k of (n,) values are not above, and few more; of which k are not above ``most``.

    Halves a range again and again: to count all values takes less than to move any.
    """
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for at in range(0, len(values), max(1, len(values) // SAMPLED)):
        low, high = min(low, values[at]), max(high, values[at])
    high = min(high, most)
    if _count(values, high) < k:
        high = min(most, np.float32(values.max()))
    if _count(values, low) >= k:
        low, high = np.float32(values.min()), low
    while True:
        middle = low + (high - low) / np.float32(2)
        if not low < middle < high:
            return high
        count = _count(values, middle)
        if count < k:
            low = middle
            continue
        high = middle
        if count <= k + k // 8:
            return high


@compiled
def choose(
    products: np.ndarray,
    units: np.ndarray,
    constants: np.ndarray,
    squares: np.ndarray,
    lowest: np.float32,
    rows: np.ndarray,
    queries: np.ndarray,
    bounds: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make products (m, n) distances, and choose the keys that may be among the k nearest of their queries.

    Args:
        products: of m queries with n keys; they are written over with the distances.
        units: (m,) what each query's products are multiplied with.
        constants: (m,) what is added for each query.
        squares: (n,) what is added for each key.
        lowest: no distance is below it.
        rows: (n,) int64, what the keys are called.
        queries: (m,) each query's number in ``bounds``.
        bounds: what the distance of each query's k-th is at most, as far as is known; lowered where more is known now.
            (Where two threads do so at once, the higher of two numbers may stay, which is as true.)
        k: neighbours of a query.

    Returns:
        How many keys were chosen for each query (m,); their distances, query by query; and their rows.
    """
    limits = np.empty(len(products), dtype=np.float32)
    counts, total = np.empty(len(products), dtype=np.int64), 0
    for query in range(len(products)):
        distances = products[query]
        _finish(distances, units[query], constants[query], squares, lowest)
        limit = bounds[queries[query]]
        count = _count(distances, limit)
        if count > k:
            limit = _within(distances, limit, k)
            bounds[queries[query]] = limit
            count = _count(distances, limit)
        limits[query], counts[query] = limit, count
        total += int(count)
    near, where, at = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.int64), 0
    which = np.empty(len(rows) + 1, dtype=np.int32)
    for query in range(len(products)):
        distances = products[query]
        for key in which[: _not_above(distances, limits[query], which)]:
            near[at], where[at] = distances[key], rows[key]
            at += 1
    return counts, near, where


@compiled
def _not_above(values: np.ndarray, most: np.float32, into: np.ndarray) -> int:
    """How many of (n,) values are not above a number; which, is written into (n + 1,)."""
    count = 0
    for at in range(len(values)):  # to write each and keep some is quicker than a branch that is foretold wrongly
        into[count] = at
        count += 1 if values[at] <= most else 0
    return count


@compiled
def nearest(
    begins: np.ndarray,
    parts: np.ndarray,
    sizes: np.ndarray,
    distances: np.ndarray,
    rows: np.ndarray,
    documents: np.ndarray,
    hashes: np.ndarray,
    into: np.ndarray,
    into_rows: np.ndarray,
) -> None:
    """Write the k nearest of each of m queries' candidates, nearest first; what is equally near by (hash of the
    document's id, position).

    Args:
        begins: (m + 1,) where each query's parts begin among ``parts``.
        parts: where each part of candidates begins in ``distances``.
        sizes: how many each has.
        distances: of all candidates.
        rows: of all candidates; -1 where there is none, which is infinitely far.
        documents: (documents,) the first row of each document, in order.
        hashes: (documents,) uint64 of their ids.
        into: (m, k) float32, filled with infinity.
        into_rows: (m, k) int64, filled with -1.
    """
    for query in range(len(into)):
        total = 0
        for part in range(begins[query], begins[query + 1]):
            total += sizes[part]
        near, where = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.int64)
        end = 0
        for part in range(begins[query], begins[query + 1]):
            for at in range(parts[part], parts[part] + sizes[part]):
                near[end], where[end] = distances[at], rows[at]
                end += 1
        _put(near, where, documents, hashes, into[query], into_rows[query])


@compiled
def nearest_in_lists(
    file: np.ndarray,
    numbers: np.ndarray,
    codes: np.ndarray,
    rows: np.ndarray,
    sizes: np.ndarray,
    firsts: np.ndarray,
    squares: np.ndarray,
    probed: np.ndarray,
    weights: np.ndarray,
    units: np.ndarray,
    constants: np.ndarray,
    lowest: np.float32,
    selected: np.ndarray,
    first_row: int,
    documents: np.ndarray,
    hashes: np.ndarray,
    into: np.ndarray,
    into_rows: np.ndarray,
) -> None:
    """Write the k nearest of each of m queries in the lists that it probes, as :func:`nearest` does.

    Args:
        file: this and what follows as of :class:`datastore.keys.Lists`.
        numbers: likewise.
        codes: likewise.
        rows: likewise.
        sizes: likewise.
        firsts: likewise.
        squares: likewise; known of the lists that are probed.
        probed: (m, probes) which lists each query probes.
        weights: (m, dimension) float32, whole numbers that codes are multiplied with.
        units: (m,) as of :func:`choose`.
        constants: (m,) likewise.
        lowest: likewise.
        selected: which rows count, (rows,) bool, from ``first_row`` on; empty for all.
        first_row: the first that there is.
        documents: as of :func:`nearest`.
        hashes: likewise.
        into: likewise.
        into_rows: likewise.
    """
    width = weights.shape[1]
    for query in range(len(into)):
        total = 0
        for number in probed[query]:
            total += sizes[number]
        near, where, end = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.int64), 0
        for number in probed[query]:
            size, begin, first = sizes[number], codes[number], firsts[number]
            own = near[end : end + size]
            whole_products(weights[query], file[begin : begin + size * width], own)
            _finish(own, units[query], constants[query], squares[first : first + size], lowest)
            for at in range(size):
                row = numbers[rows[number] + at]
                where[end + at], row = row, row - first_row
                if len(selected) and not (0 <= row < len(selected) and selected[row]):
                    own[at] = np.float32(np.inf)
            end += size
        _put(near, where, documents, hashes, into[query], into_rows[query])


@compiled
def _put(
    near: np.ndarray,
    where: np.ndarray,
    documents: np.ndarray,
    hashes: np.ndarray,
    into: np.ndarray,
    into_rows: np.ndarray,
) -> None:
    """Write the k nearest of (n,) distances, and the rows that they are to, in order; none that is infinitely far."""
    k = len(into)
    limit = min(_within(near, FARTHEST, k), FARTHEST) if len(near) > k else FARTHEST
    which = np.empty(len(near) + 1, dtype=np.int32)
    order = _ascending(near, which[: _not_above(near, limit, which)])
    there, rows = np.empty(len(order), dtype=np.float32), np.empty(len(order), dtype=np.int64)
    for at in range(len(order)):
        there[at], rows[at] = near[order[at]], where[order[at]]
    _order_ties(there, rows, k, documents, hashes)
    for at in range(min(k, len(order))):
        into[at], into_rows[at] = there[at], rows[at]


@compiled
def _ascending(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Put numbers (m,) of some of (n,) float32 values in their order: by radix, eight bits at a time."""
    bits = values.view(np.uint32)
    packed, turn = np.empty(len(which), dtype=np.uint64), np.empty(len(which), dtype=np.uint64)
    begins = np.zeros((4, 257), dtype=np.int32)
    for at in range(len(which)):
        # As whole numbers, floats have their own order if the sign is turned, and of negative ones all else too.
        own = bits[which[at]]
        own ^= _ALL if own & _SIGN else _SIGN
        packed[at] = np.uint64(own) << np.uint64(32) | np.uint64(which[at])
        for digit in range(4):
            begins[digit, 1 + (own >> np.uint32(8 * digit) & np.uint32(255))] += 1
    for digit in range(4):
        begin, shift = begins[digit], np.uint64(32 + 8 * digit)
        for value in range(256):
            begin[value + 1] += begin[value]
        for one in packed:
            bucket = one >> shift & np.uint64(255)
            turn[begin[bucket]] = one
            begin[bucket] += 1
        packed, turn = turn, packed
    for at in range(len(which)):
        which[at] = np.int32(packed[at] & np.uint64(_ALL))
    return which


@compiled
def _order_ties(near: np.ndarray, where: np.ndarray, k: int, documents: np.ndarray, hashes: np.ndarray) -> None:
    """Put rows (n,) that are equally near in order, as far as they are among the first k."""
    begin = 0
    while begin < min(k, len(near)):
        end = begin + 1
        while end < len(near) and near[end] == near[begin]:
            end += 1
        if end > begin + 1 and near[begin] < np.inf:
            tied = where[begin:end]
            of = np.empty(len(tied), dtype=np.uint64)
            for at in range(len(tied)):
                of[at] = hashes[_document(tied[at], documents)]
            _sort_pairs(of, tied)
        begin = end


@compiled
def _document(row: int, documents: np.ndarray) -> int:
    """Which of the documents, given by their first rows, a row is of."""
    low, high = 0, len(documents)
    while high - low > 1:
        middle = (low + high) >> 1
        if documents[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@compiled
def _sort_pairs(first: np.ndarray, second: np.ndarray) -> None:
    """Put pairs (n,) in order: a heap sort, since of equal distances there may be thousands.

    (Of numba's own sorts, which take many seconds to compile, none is of pairs.)
    """
    for start in range(len(first) // 2 - 1, -1, -1):
        _sift(first, second, start, len(first))
    for end in range(len(first) - 1, 0, -1):
        first[0], first[end] = first[end], first[0]
        second[0], second[end] = second[end], second[0]
        _sift(first, second, 0, end)


@compiled
def _sift(first: np.ndarray, second: np.ndarray, at: int, end: int) -> None:
    """Let a pair sink in a heap of so many, until none below it comes after it."""
    while 2 * at + 1 < end:
        child = 2 * at + 1
        if child + 1 < end and _comes_before(first, second, child, child + 1):
            child += 1
        if not _comes_before(first, second, at, child):
            return
        first[at], first[child] = first[child], first[at]
        second[at], second[child] = second[child], second[at]
        at = child


@compiled
def _comes_before(first: np.ndarray, second: np.ndarray, one: int, other: int) -> bool:
    return first[one] < first[other] or (first[one] == first[other] and second[one] < second[other])
