"""A round's pages on their way, and what was found for them on its way home.

    pages       owners -> shares of other domains; from there, and from owners inside, to the ranks that chose them
    gradients   the same back: in a domain lanes in ascending order are added to the owner's own, or to a share's sum;
                then owners add the shares' sums, of domains in ascending order

Where every rank is a domain of its own there is one step: sources in ascending rank order. All sums are in fp32 or
better.
"""

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.sent.routes import PassedOn, Route


def post_pages(k: Tensor, v: Tensor, route: Route, block_len: int, comm: Comm, name: str) -> Handle:
    """The pages of one round: k [T, Hkv, Dk], v [T, Hkv, Dv] of the owners -> [received, l', Dk + Dv].

    Where pages are passed on, the current stream waits for this rank's share (gloo: the host).
    """
    packed = k.new_empty(len(route.send_page), block_len, k.shape[2] + v.shape[2])
    parts = (k, packed[..., : k.shape[2]]), (v, packed[..., k.shape[2] :])
    if route.whole_heads is not None:
        for x, part in parts:
            for head, shard in zip(route.whole_heads, part.split(len(k) // block_len), strict=False):
                shard.copy_(_paged(x[:, head], block_len))
    else:
        for x, part in parts:
            part.copy_(_paged(x, block_len)[route.send_page, :, route.send_head])
    share = comm.post_all_to_all(packed, route.send_sizes, route.recv_sizes, "pages", name)
    if route.passed is None:
        return share
    return _pass_on(share.wait(), k, v, route.passed, block_len, comm, _inside(name))


def _pass_on(share: Tensor, k: Tensor, v: Tensor, passed: PassedOn, block_len: int, comm: Comm, name: str) -> Handle:
    packed = share.new_empty(sum(passed.send_sizes), *share.shape[1:])
    packed.index_copy_(0, passed.shared_rows.long(), share.index_select(0, passed.shared))
    own = [_paged(x, block_len)[passed.own_page, :, passed.own_head] for x in (k, v)]
    packed.index_copy_(0, passed.own_rows.long(), torch.cat(own, -1))
    return comm.post_all_to_all(packed, passed.send_sizes, passed.recv_sizes, "pages.inside", name)


class GoingHome:
    """What a rank found for its copies [received, l', Dk + Dv] of one round's pages, on its way to the owners.

    `go_on` waits for the step at hand and takes the next, until it returns true; ranks call it at the same places.
    """

    def __init__(self, grad: Tensor, route: Route, block_len: int, comm: Comm, name: str):
        self._route, self._block_len, self._comm, self._name = route, block_len, comm, name
        self._passed = route.passed
        if self._passed is None:
            self._handle = self._to_owners(grad)
        else:
            sizes = self._passed.recv_sizes, self._passed.send_sizes
            self._handle = comm.post_all_to_all(grad, *sizes, "pages.grad.inside", _inside(name))

    def go_on(self, dk: Tensor, dv: Tensor) -> bool:
        """Add what has come to the owner's dk [T, h, Dk], dv [T, h, Dv]. Whether all has."""
        home = self._handle.wait()
        if self._passed is None:
            self._add(home, dk, dv)
            return True
        share = home.new_zeros(sum(self._route.recv_sizes), *home.shape[1:])
        self._add_inside(home, share, dk, dv, self._passed)
        self._passed, self._handle = None, self._to_owners(share)
        return False

    def _to_owners(self, grad: Tensor) -> Handle:
        route = self._route
        return self._comm.post_all_to_all(grad, route.recv_sizes, route.send_sizes, "pages.grad", self._name)

    def _add(self, home: Tensor, dk: Tensor, dv: Tensor) -> None:
        """From other domains, each of which sends what it found for a page once."""
        head, page = self._route.send_head, self._route.send_page
        totals = self._pages(dk, dv)
        start = 0
        for size in self._route.send_sizes:  # no rank asks for a page twice, so within one source nothing collides
            rows = slice(start, start + size)
            _add_pages(totals, page[rows], head[rows], home[rows])
            start += size

    def _add_inside(self, home: Tensor, share: Tensor, dk: Tensor, dv: Tensor, passed: PassedOn) -> None:
        """From the lanes: for pages of the share, and for own ones. No lane asks for a page twice."""
        totals, start, shared, own = self._pages(dk, dv), 0, 0, 0
        for num_shared, num_own in zip(passed.shared_sizes, passed.own_sizes, strict=True):
            of_share, of_own = home[start : start + num_shared + num_own].split([num_shared, num_own])
            share[passed.shared[shared : shared + num_shared]] += of_share
            rows = slice(own, own + num_own)
            _add_pages(totals, passed.own_page[rows], passed.own_head[rows], of_own)
            start, shared, own = start + num_shared + num_own, shared + num_shared, own + num_own

    def _pages(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """[pages, h, l', D] of both, views."""
        k, v = (_paged(x, self._block_len).transpose(1, 2) for x in (dk, dv))
        return k, v


def _add_pages(totals: tuple[Tensor, Tensor], page: Tensor, head: Tensor, grad: Tensor) -> None:
    for total, part in zip(totals, grad.split([x.shape[-1] for x in totals], -1), strict=True):
        total[page, head] += part


def _paged(x: Tensor, block_len: int) -> Tensor:
    """[T, ...] -> [pages, l', ...], a view."""
    return x.unflatten(0, (-1, block_len))


def _inside(name: str) -> str:
    """Of the second step: `pages[2]` is passed on as `pages.inside[2]`."""
    return name.replace("[", ".inside[")
