"""The stand-in for a GPU in which CUDA kernels are tested, and the compiler for a real one."""

import ctypes
import importlib.util

import cuda_on_cpu
import pytest
import torch

from skiprnn.model.engines.cuda import nvrtc
from skiprnn.model.engines.native.build import available

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")

STRUCT = r"""
typedef unsigned int u32;
struct Arguments { const u32 *a, *b; u32* fragments; float *product, *sums; const float* x; u32* pairs; int fault; };
"""
SOURCE = (
    STRUCT
    + r"""
// a: 16 rows of 16 halves, b: 8 columns of 16; warp 0 brings them, warp 1 multiplies
extern "C" __global__ void __launch_bounds__(64, 1) multiply(const Arguments p) {
  __shared__ __align__(16) u32 a[16][8], b[16][8];
  const int l = threadIdx.x % 32, g = l >> 2, t = l & 3, block = blockIdx.x + gridDim.x * blockIdx.y;
  if (p.fault == 1 && threadIdx.x == 5) return;
  if (p.fault == 2 && threadIdx.x < 16) shuffle_xor(0, 1);
  if (threadIdx.x < 32)
    for (int i = l; i < 128; i += 32) a[i / 8][i % 8] = p.a[128 * block + i], b[i / 8][i % 8] = i < 64 ? p.b[i] : 0;
  if (p.fault != 3) barrier();
  if (threadIdx.x < 32) return;
  u32 fa[4], fb[4];
  float d[4] = {1, 1, 1, 1};
  if (p.fault == 5 && threadIdx.x >= 48) shuffle_xor(0, 1);
  ldsm(fa, reinterpret_cast<const char*>(&a[l % 16][l / 16 * 4]) + (p.fault == 4 ? 8 : 0));
  ldsm(fb, &b[l % 8][l / 8 % 2 * 4]);
  mma(d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) {
    p.fragments[(block * 32 + l) * 4 + i] = fa[i];
    p.product[(block * 16 + g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
  }
  float sum = d[0] + d[1];  // of row g, over its columns
  for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
  p.sums[block * 32 + l] = sum;
}

extern "C" __global__ void round_pairs(Arguments p) {
  for (int i = threadIdx.x; i < COUNT; i += 32) {
    p.pairs[2 * i] = pack_half(p.x[i], half_lo(pack_half(p.x[i], 0)));
    p.pairs[2 * i + 1] = pack_bfloat(half_hi(pack_half(0, p.x[i])), p.x[i]);
  }
}
"""
)
COPY = (
    STRUCT
    + r"""
extern "C" __global__ void __launch_bounds__(COUNT) copy(Arguments p) {
  p.pairs[COUNT * blockIdx.x + threadIdx.x] = p.a[COUNT * blockIdx.x + threadIdx.x] + p.fault;
}
"""
)

KEEP = (
    STRUCT
    + r"""
extern "C" __global__ void __launch_bounds__(1024, 2) keep(Arguments a) {
  __shared__ float shared[SHARED];
  float r[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) r[i] = a.x[threadIdx.x + i];
  for (int k = 0; k < a.fault; ++k) {
    shared[threadIdx.x] = r[k % 2];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) r[i] = r[i] * r[(i + 7) % COUNT] + shared[k];
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) a.product[threadIdx.x + i] = r[i];
}
"""
)


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ["a", "b", "fragments", "product", "sums", "x", "pairs"]] + [
        ("fault", ctypes.c_int)
    ]


def finite_halves() -> torch.Tensor:
    """All of them, in order, with those between two neighbours, and the floats next to these."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    halves = halves[halves.isfinite()].sort().values
    middle = (halves[1:] + halves[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([halves, middle, *near, torch.tensor([65519.996, 65520.0, -65520.0, torch.inf, -torch.inf])])


X = finite_halves()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "small.cu"
    source.write_text(SOURCE)
    return cuda_on_cpu.build(source, {"COUNT": len(X)}, folder)


def multiply(library, fault=0, order=0):
    """A product per block of (2, 3), of a (6, 16, 16) and b (16, 8): what the kernel wrote, and a and b."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 16, 16).half(), torch.randn(16, 8).half()
    columns, fragments = b.T.contiguous(), torch.zeros(6, 32, 4, dtype=torch.int32)
    product, sums = torch.zeros(6, 16, 8), torch.zeros(6, 32)
    tensors = {"a": a, "b": columns, "fragments": fragments, "product": product, "sums": sums}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    library.launch("multiply", (2, 3), 64, Arguments(**pointers, fault=fault), order)
    return a, b, fragments, product, sums


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_kernel_multiplies_as_the_isa_lays_out_its_fragments(library, order):
    a, b, fragments, product, sums = multiply(library, order=order)
    words = a.view(torch.int32).unflatten(1, (2, 8)).unflatten(3, (2, 4))  # block, i % 2, l / 4, i / 2, l % 4
    assert torch.equal(fragments, words.permute(0, 2, 4, 3, 1).reshape(6, 32, 4))
    expected = 1 + a.double() @ b.double()
    torch.testing.assert_close(product.double(), expected, rtol=1e-6, atol=1e-6)
    row_sums = expected[:, :8].sum(2).repeat_interleave(4, dim=1)
    torch.testing.assert_close(sums.double(), row_sums, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_numbers_are_rounded_as_torch_rounds_them(library):
    pairs = torch.zeros(len(X), 2, dtype=torch.int32)
    library.launch("round_pairs", (1, 1), 32, Arguments(x=X.data_ptr(), pairs=pairs.data_ptr()))
    half, bfloat = X.half(), X.bfloat16()
    expected = [half, half, half.float().bfloat16(), bfloat]
    assert torch.equal(pairs.view(torch.int16), torch.stack([part.view(torch.int16) for part in expected], 1))


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"multiply: block \(0, 0\): thread 0 waits in barrier with 63 of 64; thread 5 has ended"),
        (2, r"block \(0, 0\): thread 0 waits in shuffle_xor with 16 of 32; thread 16 waits in barrier"),
        (4, r"block \(0, 0\): thread 63 calls ldsm with a row that is not aligned to 16 bytes"),
        (5, r"block \(0, 0\): thread 32 calls ldsm where others of its warp call shuffle_xor"),
    ],
)
def test_what_would_hang_or_fault_is_an_error(library, fault, message):
    with pytest.raises(RuntimeError, match=message):
        multiply(library, fault)
    multiply(library)  # and the next launch is sound


@needs_compiler
def test_a_missing_barrier_shows_in_another_order(library):
    right = multiply(library)[3]
    assert torch.equal(multiply(library, fault=3)[3], right)  # in this order, it happens to be
    assert not all(torch.equal(multiply(library, fault=3, order=order)[3], right) for order in range(1, 4))


@needs_compiler
def test_a_source_that_does_not_compile(tmp_path):
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void f(int n) { nothing(); }')
    with pytest.raises(RuntimeError, match="nothing"):
        cuda_on_cpu.build(tmp_path / "broken.cu", {}, tmp_path)


needs_nvrtc = pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA has no NVRTC")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_compiles_for_a_gpu_that_is_not_here(arch):
    check = "#if __CUDA_ARCH__ != ARCH || __cplusplus != 201703\n#error not what was asked\n#endif\n"
    code = nvrtc.cubin(COPY + check, {"COUNT": 64, "ARCH": int(arch[3:]) * 10}, arch)
    assert code.startswith(b"\x7fELF")
    assert b".text.copy" in code


@needs_nvrtc
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="its tools are Triton's")
def test_what_a_kernel_takes_is_told(tmp_path):
    def taken(count: int, shared: int) -> cuda_on_cpu.Resources:
        code = nvrtc.cubin(KEEP, {"COUNT": count, "SHARED": shared}, "sm_80")
        return cuda_on_cpu.resources(code, tmp_path)["keep"]

    few, many = taken(8, 256), taken(100, 1024)  # floats in 32 registers
    assert 8 < few.registers <= many.registers <= 32
    assert few.stack == 0
    assert many.stack >= 4 * (100 - 32)
    assert (few.shared, many.shared) == (4 * 256, 4 * 1024)


@needs_nvrtc
def test_nvrtc_says_the_first_error():
    with pytest.raises(RuntimeError, match=r'kernels.cu\(2\): error: identifier "nothing" is undefined'):
        nvrtc.cubin("\n__device__ int f() { return nothing; }\n__device__ int g() { return nor_this; }", {}, "sm_90")
    with pytest.raises(RuntimeError, match="sm_12345"):
        nvrtc.cubin(COPY, {"COUNT": 64}, "sm_12345")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_kernel_on_a_gpu_and_in_a_graph():
    kernel = nvrtc.load(COPY, {"COUNT": 64}, ["copy"])["copy"]
    assert nvrtc.load(COPY, {"COUNT": 64}, ["copy"])["copy"] is kernel
    a, copied = torch.arange(256, dtype=torch.int32, device="cuda"), torch.zeros(256, dtype=torch.int32, device="cuda")
    arguments = Arguments(a=a.data_ptr(), pairs=copied.data_ptr(), fault=7)
    kernel((4, 1), 64, arguments)
    assert torch.equal(copied, a + 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel((4, 1), 64, arguments)
    a.add_(1)
    graph.replay()
    assert torch.equal(copied, a + 7)
