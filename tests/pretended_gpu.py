"""A pretended GPU: the branches for CUDA run on the CPU, with real numbers.

`Cuda` wraps a CPU tensor and says that it is on cuda:0. Each operator that it meets is checked for what a GPU refuses
(a CPU tensor among GPU tensors; dtypes and shapes of varlen attention and of mm with an out_dtype), run on the CPU, and
counted, with the times that the host waits for the device. Where torch has a kernel for GPUs alone, a few lines replace
it; its Python side, autograd included, is torch's own. Autocast is the CPU's, in bf16.
Not seen here: NCCL, streams, what kernels round, and how much memory and time they take.
"""

import __future__

import inspect
import math
import textwrap

import pytest
import torch
from torch.nn.attention import varlen  # noqa: F401 - registers torch_attn::_varlen_attn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten, attn = torch.ops.aten, torch.ops.torch_attn
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class Cuda(torch.Tensor):
    """A tensor that says it is on a GPU.

    Attributes:
        calls, waits: operator or copy -> how often it ran, how often the host waited for it.
        attended:     (dtype, whether there was a mask) of each scaled_dot_product_attention.
        autocasts:    the settings of each autocast context on the GPU.
    """

    calls, waits, attended, autocasts = {}, {}, set(), []

    @staticmethod
    def __new__(cls, inner):
        assert type(inner) is torch.Tensor, type(inner)
        size = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **size)

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_):
        return f"Cuda({self.inner})"

    def __reduce_ex__(self, protocol):  # torch.save writes what it holds
        return self.inner.detach().__reduce_ex__(protocol)

    def tolist(self):
        count(self.waits, "tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check(func, args, kwargs)
        count(cls.calls, str(func))
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITS or by_mask:
            count(cls.waits, str(func))
        run = KERNELS.get(func, func)
        out = run(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, out))


def count(where, name):
    where[name] = where.get(name, 0) + 1


def unwrap(x):
    return x.inner if isinstance(x, Cuda) else x


def wrap(x):
    return Cuda(x) if type(x) is torch.Tensor else x


def check(func, args, kwargs):
    """What a GPU refuses."""
    if func is aten.copy_.default:
        if isinstance(args[0], Cuda) != isinstance(args[1], Cuda):
            count(Cuda.waits, "copy between devices")
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if func in INDEXING:
        assert isinstance(args[0], Cuda), f"{func}: a CPU tensor indexed by a GPU tensor"
        tensors = [args[0], *args[2:3]]  # the indices may be on the CPU
    odd = [x for x in tensors if isinstance(x, torch.Tensor) and not isinstance(x, Cuda) and x.dim()]
    assert not odd, f"{func}: a CPU tensor {tuple(odd[0].shape)} among GPU tensors"


# ------------------------------------------------------------------------------- kernels for GPUs alone


def varlen_forward(q, k, v, ends, ends_k, max_q, max_k, is_causal=False, scale=None, window=None, enable_gqa=False, *_):
    """What torch's flash kernel does, and what it refuses."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16), (q.dtype, k.dtype, v.dtype)
    assert q.dim() == k.dim() == v.dim() == 3 and q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert q.shape[2] % 8 == 0 and all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[1] % k.shape[1] == 0
    assert ends.dtype == torch.int32 and ends.is_contiguous() and torch.equal(ends, ends_k)
    assert ends[0] == 0 and ends[-1] == len(q) == len(k) and (ends.diff() > 0).all() and ends.diff().max() == max_q
    out = torch.empty(q.shape, dtype=q.dtype)
    for row, p, _, _, value in attention_of_rows(q, k, v, ends, window):
        out[row] = torch.einsum("hts,shd->thd", p, value).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def attention_of_rows(q, k, v, ends, window):
    """For each row: its place, its probabilities (heads, T, T), and q, k, v (T, heads, d) in fp32."""
    (left, right), group = window, q.shape[1] // k.shape[1]
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        row = slice(start, stop)
        query, key, value = q[row].float(), *(x[row].float().repeat_interleave(group, dim=1) for x in (k, v))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distance >= -right if right >= 0 else True) & (distance <= left if left >= 0 else distance == distance)
        z = torch.einsum("thd,shd->hts", query, key) / math.sqrt(q.shape[2])
        yield row, z.masked_fill(~seen, -torch.inf).softmax(dim=-1), query, key, value


def varlen_backward(into, q, k, v, out, lse, ends, ends_k, max_q, max_k, causal, rng, scale=None, window=None):
    assert into.shape == out.shape == q.shape and into.dtype == q.dtype
    into_q, into_k, into_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for row, p, query, key, value in attention_of_rows(q, k, v, ends, window):
        g = into[row].float()
        into_p = torch.einsum("thd,shd->hts", g, value)
        into_z = p * (into_p - (into_p * p).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[2])
        into_q[row] = torch.einsum("hts,shd->thd", into_z, key).to(q.dtype)
        parts = (into_k, torch.einsum("hts,thd->shd", into_z, query)), (into_v, torch.einsum("hts,thd->shd", p, g))
        for whole, part in parts:
            whole[row] = part.unflatten(1, (k.shape[1], -1)).sum(dim=2).to(q.dtype)
    return into_q, into_k, into_v


def mm_out_dtype(a, b, out_dtype):
    assert a.dtype == b.dtype in (torch.float16, torch.bfloat16) and out_dtype == torch.float32, (a.dtype, b.dtype)
    return torch.mm(a.float(), b.float())


KERNELS = {
    attn._varlen_attn.default: varlen_forward,
    attn._varlen_attn_backward.default: varlen_backward,
    aten.mm.dtype: mm_out_dtype,
}


class Machine(TorchFunctionMode):
    """Tensors made with a device of type cuda, or moved to one, are Cuda; those moved off are not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self.move(func, *args, **kwargs)
        if func is torch.Tensor.backward:  # what is run again on the way back is on this machine too
            with self, torch.no_grad():
                gradients = (torch.ones_like(args[0]),)
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(args, gradients, False, False, (), True, accumulate_grad=True)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], Cuda):
            self.attend(args[0], args[1], kwargs["attn_mask"])
        place = kwargs.get("device")
        if place is not None and torch.device(place).type == "cuda":
            kwargs["device"] = "cpu"
            made = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
            if func in (torch.tensor, torch.as_tensor):
                count(Cuda.waits, "tensor to the GPU")
            return Cuda(made.detach()).requires_grad_(made.requires_grad)
        if place is not None and any(isinstance(x, Cuda) for x in args):
            raise AssertionError(f"{func}: of a GPU tensor onto {place}")
        return func(*args, **kwargs)

    def attend(self, q, k, mask):
        """Grouped heads have one fused kernel: flash, in 16 bits without a mask; else all T x T weights are written."""
        Cuda.attended.add((q.dtype, mask is not None))
        flash = q.dtype != torch.float32 and mask is None
        assert q.shape[1] == k.shape[1] or flash, f"the math kernel: {q.shape[1]} and {k.shape[1]} heads in {q.dtype}"

    def move(self, func, x, *args, **kwargs):
        places = [p for p in (*args, *kwargs.values()) if isinstance(p, (str, torch.device))]
        dtypes = [p for p in (*args, *kwargs.values()) if isinstance(p, torch.dtype)]
        onto = torch.device(places[0]).type if places else x.device.type
        onto = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: "cuda"}.get(func, onto)
        for dtype in dtypes:
            if isinstance(x, Cuda):
                x = x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)
            else:
                x = torch._C._TensorBase.to(x, dtype)
        if onto == x.device.type:
            return x
        count(Cuda.waits, f"copy to {onto}")
        assert not (x.requires_grad and torch.is_grad_enabled() and not x.is_leaf), "no gradient through this copy"
        return Cuda(x.detach()) if onto == "cuda" else x.detach().inner


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of 80 GiB, as far as Python can tell."""
    Cuda.calls, Cuda.waits, Cuda.attended, Cuda.autocasts = {}, {}, set(), []
    enabled, kind, autocast, load = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast, torch.load

    def on_cpu(device, **settings):
        if device == "cuda" and settings.get("enabled", True):
            Cuda.autocasts.append(settings)
        return autocast("cpu", **settings)

    def from_disk(file, map_location=None, **settings):
        found = load(file, map_location="cpu", **settings)
        return tree_map(wrap, found) if torch.device(map_location).type == "cuda" else found

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: kind("cpu"))
    monkeypatch.setattr(torch, "autocast", on_cpu)
    monkeypatch.setattr(torch, "load", from_disk)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "is_bf16_supported": True,
        "get_device_name": "a pretended GPU",
        "mem_get_info": (79 * 2**30, 80 * 2**30),
        "memory_reserved": 2**30,
        "max_memory_allocated": 0,
        "set_device": None,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with Machine():
        yield


def mutated(function, old, new):
    """The code of a function in whose source `old`, which is there once, reads `new`."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]  # without decorators
    assert source.count(old) == 1, f"{function.__name__}: {source.count(old)} x {old!r}"
    names, flags = dict(function.__globals__), __future__.annotations.compiler_flag
    exec(compile(source.replace(old, new), function.__code__.co_filename, "exec", flags, True), names)
    return names[function.__name__].__code__
