"""The cells' equations and their gradients, element by element, as in ../native/cells.h.

a: pre-activations, LSTM i j f o, GRU r z candidate; d_: gradients, of the candidate state unless said otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def lstm_gates(a):
    return tl.sigmoid(a[0]), tanh(a[1]), tl.sigmoid(a[2]), tl.sigmoid(a[3])


@triton.jit
def lstm(gates, c):
    """h~, c~: c~ = c f + i j;  h~ = tanh(c~) o."""
    i, j, f, o = gates
    c_new = c * f + i * j
    return tanh(c_new) * o, c_new


@triton.jit
def lstm_backward(gates, c, d_h, d_c):
    """The gradients of i, j, f, o's pre-activations, and of the old c."""
    i, j, f, o = gates
    tanh_c = tanh(c * f + i * j)
    d_c += d_h * o * (1 - tanh_c * tanh_c)
    d_i, d_j = d_c * j * i * (1 - i), d_c * i * (1 - j * j)
    return d_i, d_j, d_c * c * f * (1 - f), d_h * tanh_c * o * (1 - o), d_c * f


@triton.jit
def gru(a_z, a_candidate, h):
    """h~ = z h + (1 - z) tanh(candidate)."""
    z = tl.sigmoid(a_z)
    return z * h + (1 - z) * tanh(a_candidate)


@triton.jit
def gru_backward(a_z, a_candidate, h, d_h):
    """The gradients of z's and the candidate's pre-activations, and of the old h but for r."""
    z, candidate = tl.sigmoid(a_z), tanh(a_candidate)
    return d_h * (h - candidate) * z * (1 - z), d_h * (1 - z) * (1 - candidate * candidate), d_h * z


@triton.jit
def reset_backward(r, h, d_rh):
    """The gradients of r's pre-activation, and of h, from that of r * h."""
    return d_rh * h * r * (1 - r), d_rh * r
