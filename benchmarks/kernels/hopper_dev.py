import os, sys, subprocess, time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "src"))
import torch


def ref(q, k, v, seqlens, scale, pre=None):
    H, K = q.shape[1], k.shape[1]
    g = H // K
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    b0 = 0
    for b, n in enumerate(seqlens):
        for h in range(H):
            kk = k[b0 : b0 + n, h // g].double()
            vv = v[b0 : b0 + n, h // g].double()
            qq = q[b0 : b0 + n, h].double()
            s = qq @ kk.T * scale
            s = s.masked_fill(torch.ones(n, n, device=q.device).triu(1).bool(), float("-inf"))
            if pre is not None:
                pk, pv = pre[b][h // g]
                s = torch.cat([qq @ pk.double().T * scale, s], 1)
                vv = torch.cat([pv.double(), vv])
            lse[b0 : b0 + n, h] = s.logsumexp(-1)
            out[b0 : b0 + n, h] = s.softmax(-1) @ vv
        b0 += n
    return out, lse


def make_prefix(lens, K, D, dtype, seed=0):
    # lens: [B][G][K]
    from compactor_vllm.kv_cache.layer_cache import LayerCache
    from compactor_vllm.attention.reference import RaggedPrefix

    g = torch.Generator().manual_seed(seed)
    B = len(lens)
    G = len(lens[0])
    S = B * G
    need = [-(-l // 128) for b in lens for s in b for l in s]
    P = sum(need) + 7
    pool = torch.full((P, 2, 128, D), float("nan"), dtype=dtype, device="cuda")
    perm = torch.randperm(P, generator=g).tolist()
    table = []
    begins = []
    sl = []
    pre = []
    for b in range(B):
        per = [[[], []] for _ in range(K)]
        for s in range(G):
            hb = []
            hl = []
            for h in range(K):
                n = lens[b][s][h]
                hb.append(len(table))
                hl.append(n)
                for p in range(-(-n // 128)):
                    pg = perm.pop()
                    table.append(pg)
                    r = min(128, n - 128 * p)
                    pool[pg, :, :r] = torch.randn(2, r, D, device="cuda").to(dtype)
                    per[h][0].append(pool[pg, 0, :r])
                    per[h][1].append(pool[pg, 1, :r])
            begins.append(hb)
            sl.append(hl)
        e = torch.zeros(0, D, dtype=dtype, device="cuda")
        pre.append([(torch.cat([e] + x[0]), torch.cat([e] + x[1])) for x in per])
    i = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    cache = LayerCache(
        k_pages_PRD=pool[:, 0],
        v_pages_PRD=pool[:, 1],
        positions_PR=torch.zeros(P, 128, dtype=torch.int32, device="cuda"),
        scores_PR=torch.zeros(P, 128, device="cuda"),
        page_table=i(table + [0]),
        head_begin_SK=i(begins),
        seg_lens_SK=i(sl),
        page_size=128,
    )
    segs = torch.full((B, 8), -1, dtype=torch.int32, device="cuda")
    for b in range(B):
        for s in range(G):
            segs[b, s] = b * G + s
    return RaggedPrefix(cache=cache, segments_BG=segs, max_len=0), pre


def check(name, seqlens, H=4, K=2, D=128, dtype=torch.bfloat16, lens=None, kscale=1.0, **kw):
    from compactor_vllm.attention import hopper_varlen_kernel as hk

    T = sum(seqlens)
    q, k, v = (torch.randn(T, h, D, device="cuda").to(dtype) for h in (H, K, K))
    if kscale != 1:
        k[:T//2]*=kscale; k[T//2:T//2+T//4]*=kscale/4
    out = torch.full_like(q, float("nan"))
    lse = torch.full((T, H), float("nan"), device="cuda")
    prefix = pre = None
    if lens is not None:
        prefix, pre = make_prefix(lens, K, D, dtype)
    scale = D**-0.5
    hk.prefill_attention_hopper(q, k, v, tuple(seqlens), scale, out=out, lse=lse, prefix=prefix, **kw)
    torch.cuda.synchronize()
    o, l = ref(q, k, v, seqlens, scale, pre)
    e = ((out.double() - o).norm() / o.norm()).item()
    el = (lse.double() - l).abs().max().item()
    worst = (out.double() - o).abs().max().item()
    out2 = torch.full_like(q, float("nan"))
    hk.prefill_attention_hopper(q, k, v, tuple(seqlens), scale, out=out2, lse=lse.clone(), prefix=prefix, **kw)
    same = torch.equal(out, out2)
    print(
        f"{'ok ' if e < 5e-3 and el < 1e-3 and same else 'BAD'} {name} rel {e:.2e} max {worst:.2e} lse {el:.2e} same {same}",
        flush=True,
    )


def run_check():
    from compactor_vllm.attention.hopper_varlen_kernel import HopperConfig
    check("128",[128]); check("1",[1]); check("1000 many items",[1000],H=32,K=8)
    check("batch",[1,127,128,129,255,256,257,640,33],H=8,K=2)
    check("3000",[3000],H=32,K=8)
    for x in (2,5,10,30,100): check(f"k x {x}",[1500,300],H=8,K=2,kscale=float(x))
    check("qregs",[300,129,1000],H=8,K=2,config=HopperConfig(q_regs=True)); check("qregs x 30",[1500,300],H=8,K=2,kscale=30.,config=HopperConfig(q_regs=True))
    check("fp16",[700,129],dtype=torch.float16)
    for x in (3,30): check(f"fp16 k x {x}",[1500,300],dtype=torch.float16,kscale=float(x))
    check("D64",[300,129,1000],D=64,H=8,K=2)

def run_prefix():
    check("p0", [200], lens=[[[0, 0]]])
    check("p1", [200], lens=[[[1, 1]]])
    check("p127", [130], lens=[[[127, 127]]])
    check("p128", [200], lens=[[[128, 128]]])
    check("p129", [200], lens=[[[129, 129]]])
    check("ragged", [200, 1, 300], H=8, K=4, lens=[[[0, 1, 127, 128]], [[129, 255, 256, 257]], [[1000, 3, 0, 640]]])
    check(
        "two segs",
        [200, 77],
        H=8,
        K=4,
        lens=[[[0, 1, 127, 128], [5, 128, 300, 0]], [[129, 255, 256, 257], [1, 1, 0, 130]]],
    )
    check('two segs x 40',[700,77],H=8,K=4,kscale=40.,lens=[[[0,1,127,128],[5,128,300,0]],[[129,255,256,257],[1,1,0,130]]])

def bench(f, rep=150):
    import triton

    return triton.testing.do_bench(f, warmup=30, rep=rep, return_mode="median")


def run_time(D=128, which="all"):
    from compactor_vllm.attention import hopper_varlen_kernel as hk
    from compactor_vllm.attention.hopper_varlen_kernel import HopperConfig
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    import triton

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(torch.cuda.get_device_name(0), "matmul", 2 * 8192**3 / bench(lambda: a @ b) / 1e9, flush=True)
    C=HopperConfig
    cfgs={"eager":C(lazy=False),"lazy":C(),"lazy free":C(turns=False),"q":C(q_regs=True),"q free":C(q_regs=True,turns=False),"q l2 .25":C(q_regs=True,l2_share=.25)}
    H,K=32,8
    for S in (4096,16384,32768,65536):
        q=torch.randn(S,H,D,device="cuda",dtype=torch.bfloat16); k,v=(torch.randn(S,K,D,device="cuda",dtype=torch.bfloat16) for _ in range(2))
        out=torch.empty_like(q); qt,kt,vt=(x.transpose(0,1)[None] for x in (q,k,v))
        fl=4*S*S*H*D/2
        for r in range(2):
            row=[]
            for n,c in cfgs.items():
                ms=bench(lambda:hk.prefill_attention_hopper(q,k,v,(S,),D**-.5,out=out,config=c)); row.append(f"{n} {fl/ms/1e9:.0f}")
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                ms=bench(lambda:sdpa(qt,kt,vt,is_causal=True,enable_gqa=True)); row.append(f"cuDNN {fl/ms/1e9:.0f}")
            print(D,S,", ".join(row),flush=True)

def run_ncu():
    from compactor_vllm.attention import hopper_varlen_kernel as hk
    C=hk.HopperConfig; S=16384
    q=torch.randn(S,32,128,device="cuda",dtype=torch.bfloat16); k,v=(torch.randn(S,8,128,device="cuda",dtype=torch.bfloat16) for _ in range(2))
    for c in (C(lazy=False),C(),C(q_regs=True)):
        for _ in range(2): hk.prefill_attention_hopper(q,k,v,(S,),128**-.5,config=c)
    torch.cuda.synchronize()

def run_time64():
    run_time(64)


def run_ptime():
    from compactor_vllm.attention import hopper_varlen_kernel as hk

    for n, L in ((4096, 32768),):
        q = torch.randn(n, 32, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(n, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        p, _ = make_prefix([[[L] * 8]], 8, 128, torch.bfloat16)
        ms = bench(lambda: hk.prefill_attention_hopper(q, k, v, (n,), 128**-0.5, prefix=p))
        fl = 4 * 32 * 128 * (n * n / 2 + n * L)
        print("prefix", L, n, f"{fl / ms / 1e9:.0f} TFLOP/s", flush=True)
    lens = [16384 >> (i % 5) for i in range(16)]
    T = sum(lens)
    q = torch.randn(T, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(T, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = bench(lambda: hk.prefill_attention_hopper(q, k, v, tuple(lens), 128**-0.5))
    fl = sum(2 * 32 * 128 * x * x for x in lens)
    print("varlen", f"{fl / ms / 1e9:.0f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "one":
        t = time.time()
        globals()["run_" + sys.argv[2]]()
        print(sys.argv[2], "took", round(time.time() - t, 1), flush=True)
    else:
        for part in sys.argv[1:]:
            name, lim = part.split(":")
            t = time.time()
            cmd=[sys.executable,"-u",__file__,"one",name]
            if name=="ncu": cmd=["ncu","--clock-control","none","--section","SpeedOfLight","--section","ComputeWorkloadAnalysis","--section","WarpStateStats","--section","MemoryWorkloadAnalysis","-k","regex:prefill_kernel","--log-file",os.environ.get("OUT","/tmp")+"/ncu.txt"]+cmd
            p=subprocess.Popen(cmd,stdout=subprocess.PIPE,stderr=subprocess.STDOUT,text=True)
            try:
                o, _ = p.communicate(timeout=float(lim))
            except subprocess.TimeoutExpired:
                p.kill()
                o, _ = p.communicate()
                o += "\nTIMEOUT"
            print("==", name, "rc", p.returncode, round(time.time() - t, 1), "s\n", o[-4200:], flush=True)
