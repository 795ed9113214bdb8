"""Context parallelism: the ranks of `cp` share every sequence.

A sequence is cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r, so that under a causal mask all have the same work. Two ways to
attend across ranks, both exact under the document mask because (document, position) travel with the tokens:

- `RingAttention`: keys and values go round; each rank attends with its queries to one rank's keys at a time, and partial results are
  joined by their log-sum-exp (Liu et al. 2023, arXiv 2310.01889). The backward pass sends keys and values round once more with their
  gradients, so that no rank ever holds those of the whole sequence.
- `AllToAllAttention`: heads are exchanged for positions (Jacobs et al. 2023, arXiv 2309.14509), the plain core runs on whole sequences of fewer
  heads, and the result is exchanged back. Needs as many (local) heads as ranks; less traffic where it fits.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from regrowth.parallel.collectives import all_gather, exchange


class Core(Protocol):
    """An attention core of one process."""

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> Any: ...

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Any) -> torch.Tensor: ...


def local_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """The indices int64 [T / size] along a sequence that a rank of `cp` holds."""
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))


def take_part(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """A rank's part of a micro-batch, every tensor [B, T] cut along T."""
    if size == 1:
        return batch
    chosen = local_positions(batch["tokens"].shape[1], rank, size)
    return {name: tensor[:, chosen.to(tensor.device)] for name, tensor in batch.items()}


class Places(NamedTuple):
    """Whose tokens they are: documents and positions, int [B, T]."""

    docs: torch.Tensor
    positions: torch.Tensor


class Tile(NamedTuple):
    """A band of this rank's queries and a chunk of another's keys of which some pair is visible."""

    rows: slice
    keys: slice


class RingMask(NamedTuple):
    """Every rank's places, and by rank the tiles that have to be computed; what is left out nobody sees."""

    places: list[Places]
    tiles: list[list[Tile]]


_TILE_PAIRS = 1 << 21  # pairs of query and key in a tile, over all sequences: 8 MiB of fp32 scores a head


class RingAttention:
    """An attention core over a ring of ranks.

    Scores are held tile by tile, never for all of a rank's queries; tiles behind every query of a band, or of documents that it has nothing of,
    are not computed: under a causal mask alone that is half of them, on every rank alike.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> RingMask:
        """The places of every rank's tokens are small, so they are gathered once for all layers; so is what is visible decided once."""
        both = all_gather(torch.stack((doc_ids_BT, positions_BT))[None], 0, self.group)
        places = [Places(docs, positions) for docs, positions in both.unbind(0)]
        mine, (batch, length) = places[self.group.rank()], doc_ids_BT.shape
        chunk = (length + 1) // 2  # a rank has two; no band lies in both
        rows = max(16, _TILE_PAIRS // (batch * chunk))
        chunks = [slice(begin, min(begin + chunk, length)) for begin in range(0, length, chunk)]
        bands = [slice(i, min(i + rows, part.stop)) for part in chunks for i in range(part.start, part.stop, rows)]
        tiles = [Tile(band, keys) for band in bands for keys in chunks]
        seen = [torch.stack([_seen(mine, theirs, tile).any() for tile in tiles]) for theirs in places]
        needed = torch.stack(seen).tolist()  # all of it brought to the host at once
        return RingMask(places, [[tile for tile, wanted in zip(tiles, row, strict=True) if wanted] for row in needed])

    @torch.compiler.disable  # messages break a graph anyway, and tiles differ from rank to rank and from batch to batch
    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: RingMask) -> torch.Tensor:
        """[B, H, T, d] of this rank's queries, after every rank's keys."""
        return _Ring.apply(q_BHTd, k_BHTd, v_BHTd, mask, self.group)  # pyright: ignore[reportReturnType]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: RingMask, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.mask, ctx.group = mask, group
        with torch.autocast(q.device.type, enabled=False):  # scores and sums are fp32
            out, log_sum = _Ring._attend(q, k, v, mask, group)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out.to(q.dtype)

    @staticmethod
    def _attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: RingMask, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, rank = group.size(), group.rank()
        out, log_sum = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        held = torch.stack((k, v))
        for turn in range(size):
            coming = _Rotation(held, group) if turn < size - 1 else None  # while this turn computes
            owner = (rank - turn) % size
            for tile in mask.tiles[owner]:
                rows = tile.rows
                k_tile, v_tile = held[:, :, :, tile.keys]
                scores = _scores(q[:, :, rows], k_tile, _seen(mask.places[rank], mask.places[owner], tile))
                before = log_sum[:, :, rows]
                joined = torch.logaddexp(before, torch.logsumexp(scores, dim=-1))
                weights = (scores - _finite(joined)[..., None]).exp_()
                out[:, :, rows] = out[:, :, rows] * (before - _finite(joined)).exp_()[..., None] + _times_values(weights, v_tile)
                log_sum[:, :, rows] = joined
            held = coming.wait() if coming else held
        return out, log_sum

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Ring._gradients(ctx, grads[0].float())

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        group, mask = ctx.group, ctx.mask
        size, rank, scale = group.size(), group.rank(), q.shape[-1] ** -0.5
        delta = (grad * out).sum(dim=-1, keepdim=True)
        grad_q = torch.zeros_like(out)
        held, slopes = torch.stack((k, v)), torch.zeros((2, *k.shape), dtype=torch.float32, device=k.device)
        for turn in range(size):
            coming = _Rotation(held, group) if turn < size - 1 else None
            owner = (rank - turn) % size
            for tile in mask.tiles[owner]:
                rows, (k_tile, v_tile) = tile.rows, held[:, :, :, tile.keys]
                q_rows, grad_rows = q[:, :, rows].float(), grad[:, :, rows]
                scores = _scores(q_rows, k_tile, _seen(mask.places[rank], mask.places[owner], tile))
                weights = (scores - _finite(log_sum[:, :, rows])[..., None]).exp_()
                to_weights = (_grouped(grad_rows, k.shape[1]) @ v_tile[:, :, None].float().transpose(-1, -2)).flatten(1, 2)
                pull = weights * to_weights.sub_(delta[:, :, rows])
                grad_q[:, :, rows] += _times_values(pull, k_tile) * scale
                # Query heads of one group share a key head: their contributions add up.
                slopes[0, :, :, tile.keys] += (_grouped(pull, k.shape[1]).transpose(-1, -2) @ _grouped(q_rows, k.shape[1])).sum(2) * scale
                slopes[1, :, :, tile.keys] += (_grouped(weights, k.shape[1]).transpose(-1, -2) @ _grouped(grad_rows, k.shape[1])).sum(2)
            # The gradients travel with their keys, and after a whole round are home.
            slopes = _Rotation(slopes, group).wait()
            held = coming.wait() if coming else held
        return grad_q.to(q.dtype), slopes[0].to(k.dtype), slopes[1].to(v.dtype), None, None


def _grouped(x_BHTd: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[B, H, T, d] as [B, key heads, H / key heads, T, d]."""
    return x_BHTd.unflatten(1, (key_heads, -1))


def _seen(mine: Places, theirs: Places, tile: Tile) -> torch.Tensor:
    """Which of a tile's queries see which of its keys: bool [B, rows, keys]."""
    rows, keys = tile
    same = mine.docs[:, rows, None] == theirs.docs[:, None, keys]
    return same & (mine.positions[:, rows, None] >= theirs.positions[:, None, keys])


def _scores(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Masked scores fp32 [B, H, Tq, Tk]."""
    scores = (_grouped(q.float(), k.shape[1]) @ k[:, :, None].float().transpose(-1, -2)).flatten(1, 2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, None], -torch.inf)


def _times_values(weights_BHTS: torch.Tensor, v_BHSd: torch.Tensor) -> torch.Tensor:
    return (_grouped(weights_BHTS, v_BHSd.shape[1]) @ v_BHSd[:, :, None].float()).flatten(1, 2)


def _finite(log_sum: torch.Tensor) -> torch.Tensor:
    """Rows that have seen nothing yet have log-sum-exp -inf; 0 in its place keeps exp(-inf - it) at 0 instead of NaN."""
    return log_sum.masked_fill(log_sum == -torch.inf, 0.0)


class _Rotation:
    """x on its way to the next rank of the ring; `wait` gives what came from the one before."""

    def __init__(self, x: torch.Tensor, group: dist.ProcessGroup) -> None:
        size, rank = group.size(), group.rank()
        self.sent, self.received = x.contiguous(), torch.empty_like(x)
        onward, back = dist.get_global_rank(group, (rank + 1) % size), dist.get_global_rank(group, (rank - 1) % size)
        operations = [dist.P2POp(dist.isend, self.sent, onward, group), dist.P2POp(dist.irecv, self.received, back, group)]
        self.work = dist.batch_isend_irecv(operations)

    def wait(self) -> torch.Tensor:
        """Raises if the neighbour is gone."""
        for work in self.work:
            work.wait()
        return self.received


class AllToAllAttention:
    """The plain core on whole sequences of this rank's share of the heads."""

    def __init__(self, core: Core, group: dist.ProcessGroup) -> None:
        self.core, self.group = core, group

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> Any:
        """The core's mask over the whole sequence, in the order in which the exchange delivers it."""
        both = all_gather(torch.stack((doc_ids_BT, positions_BT)), 2, self.group)
        return self.core.mask(both[0], both[1])

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Any) -> torch.Tensor:
        """[B, H, T, d] of this rank's positions."""
        q, k, v = (self._heads_for_positions(x) for x in (q_BHTd, k_BHTd, v_BHTd))
        return self._positions_for_heads(self.core(q, k, v, mask))

    def _heads_for_positions(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T/cp, d] -> [B, H/cp, T, d]."""
        size = self.group.size()
        sent = torch.cat(x.chunk(size, dim=1))  # [cp B, H/cp, T/cp, d], for rank r its heads
        equal = [x.shape[0]] * size
        return torch.cat(exchange(sent, equal, equal, self.group).chunk(size), dim=2)

    def _positions_for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H/cp, T, d] -> [B, H, T/cp, d]."""
        size = self.group.size()
        equal = [x.shape[0]] * size
        return torch.cat(exchange(torch.cat(x.chunk(size, dim=2)), equal, equal, self.group).chunk(size), dim=1)
