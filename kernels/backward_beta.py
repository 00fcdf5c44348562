"""dbeta of tokens whose beta is zero, or too small to divide by its square.

dbeta_i = <dR_i, e_i>, where e_i is the error that beta_i multiplies (Vd_i = beta_i e_i) and dR_i the
gradient of that product (dV_i = beta_i dR_i). backward_gradients.py divides <dV_i, Vd_i> by beta_i^2
and lists the (chunk, head) pairs that hold a smaller beta. For those, without a division,

    e = V - gamma (K S) - N Vd        dR = r (K dS) + P^T dO - N^T dV
    N_ij = exp(G_i - G_j) k_i k_j, j < i        P_ij = scale exp(G_i - G_j) q_i k_j, j <= i

A launch costs a few microseconds where the list is empty; it is written to be short, not fast.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, FLAGS, SEARCH, TARGET, find_document


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def beta_gradient(
    *, smallest, dtype="bfloat16", beta_dtype="float32", normalize=False, processors=132
):
    C, K, V = CHUNK, 128, 128
    f32, i32 = "float32", "int32"
    L, NC, Hk, Hv = T.dynamic("L"), T.dynamic("NC"), T.dynamic("Hk"), T.dynamic("Hv")
    N1, NP = T.dynamic("N1"), T.dynamic("NP")
    NR, NQ = T.dynamic("NR"), T.dynamic("NQ")

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, V), dtype),
        do: T.Tensor((L, Hv, V), dtype),
        vd: T.Tensor((NC, Hv, C, V), dtype),
        dv: T.Tensor((L, Hv, V), dtype),
        entering: T.Tensor((NC, Hv, V, K), dtype),
        dleaving: T.Tensor((NC, Hv, V, K), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        qnorm: T.Tensor((NQ, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        pairs: T.Tensor((NP,), i32),
        dbeta: T.Tensor((L, Hv), f32),
        scale: T.float32,
        first: T.int32,
    ):
        with T.Kernel(processors, threads=128) as bx:
            T.import_source(SEARCH)
            qs = T.alloc_shared((C, K), dtype)
            ks = T.alloc_shared((C, K), dtype)
            vs = T.alloc_shared((C, V), dtype)
            dos = T.alloc_shared((C, V), dtype)
            vds = T.alloc_shared((C, V), dtype)
            dvs = T.alloc_shared((C, V), dtype)
            Ss = T.alloc_shared((V, K), dtype)
            Ds = T.alloc_shared((V, K), dtype)
            ns = T.alloc_shared((C, C), dtype)
            ps = T.alloc_shared((C, C), dtype)
            gs = T.alloc_shared((C,), f32)
            rk = T.alloc_shared((C,), f32)
            rq = T.alloc_shared((C,), f32)
            M = T.alloc_fragment((C, C), f32)
            Mb = T.alloc_fragment((C, C), dtype)
            e = T.alloc_fragment((C, V), f32)
            dR = T.alloc_fragment((C, V), f32)
            row_sum = T.alloc_fragment((C,), f32)
            doc = T.alloc_local((1,), i32)
            full = T.alloc_barrier(128)
            tiles = (qs, ks, vs, dos, vds, dvs, Ss, Ds, ns, ps)
            T.annotate_layout({x: tilelang.layout.make_swizzled_layout(x) for x in tiles})
            tx = T.get_thread_binding()

            for i in T.serial(T.ceildiv(pairs[0] - bx, processors)):
                pair = pairs[1 + bx + i * processors]
                slot = T.truncdiv(pair, Hv)
                h = pair - slot * Hv
                hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                find_document(cu, first + slot, C, N1 - 1, doc)
                row = cu[doc[0]] + (first + slot - T.truncdiv(cu[doc[0]], C) - doc[0]) * C
                valid = cu[doc[0] + 1] - row
                T.tma_copy(q[row : row + C, hk, :], qs, barrier=full)
                T.tma_copy(k[row : row + C, hk, :], ks, barrier=full)
                T.tma_copy(v[row : row + C, h, :], vs, barrier=full)
                T.tma_copy(do[row : row + C, h, :], dos, barrier=full)
                T.tma_copy(vd[slot, h, :, :], vds, barrier=full)
                T.tma_copy(dv[row : row + C, h, :], dvs, barrier=full)
                T.tma_copy(entering[slot, h, :, :], Ss, barrier=full)
                T.tma_copy(dleaving[slot, h, :, :], Ds, barrier=full)
                T.tma_copy(gate[slot, h, :], gs, barrier=full)
                if normalize:
                    T.tma_copy(rnorm[slot, hk, :], rk, barrier=full)
                    T.tma_copy(qnorm[slot, hk, :], rq, barrier=full)
                T.mbarrier_arrive(full)
                T.mbarrier_wait_parity(full, i % 2)
                if not normalize:
                    if tx < C:
                        rk[tx] = 1.0
                        rq[tx] = 1.0
                    T.sync_threads()
                T.wgmma_gemm(qs, ks, M, transpose_B=True, clear_accum=True)
                T.wait_wgmma(0)
                for x, y in T.Parallel(C, C):
                    M[x, y] = T.if_then_else(
                        x >= y and x < valid,
                        M[x, y] * (scale * rq[x] * rk[y]) * T.exp2(gs[x] - gs[y]),
                        0.0,
                    )
                T.copy(M, Mb)
                T.copy(Mb, ps)
                T.wgmma_gemm(ks, ks, M, transpose_B=True, clear_accum=True)
                T.wait_wgmma(0)
                for x, y in T.Parallel(C, C):
                    M[x, y] = T.if_then_else(
                        x > y and x < valid, -M[x, y] * (rk[x] * rk[y]) * T.exp2(gs[x] - gs[y]), 0.0
                    )
                T.copy(M, Mb)
                T.copy(Mb, ns)
                T.fence_proxy_async()
                T.sync_threads()
                T.wgmma_gemm(ks, Ss, e, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(ks, Ds, dR, transpose_B=True, clear_accum=True)
                T.wait_wgmma(0)
                for x, y in T.Parallel(C, V):
                    e[x, y] = vs[x, y] - e[x, y] * (T.exp2(gs[x]) * rk[x])
                for x, y in T.Parallel(C, V):
                    dR[x, y] *= T.exp2(gs[C - 1] - gs[x]) * rk[x]
                T.wgmma_gemm(ns, vds, e)
                T.wgmma_gemm(ps, dos, dR, transpose_A=True)
                T.wgmma_gemm(ns, dvs, dR, transpose_A=True)
                T.wait_wgmma(0)
                for x, y in T.Parallel(C, V):
                    e[x, y] *= dR[x, y]
                T.reduce_sum(e, row_sum, dim=1, clear=True)
                for x in T.Parallel(C):
                    if x < valid:
                        if T.abs(T.cast(beta[row + x, h], f32)) < smallest:
                            dbeta[row + x, h] = row_sum[x]
                T.sync_threads()

    return main
