import sys, dataclasses
from torch_sinkhorn_attn.aot.environment import prepare
prepare()
import jax, jax.numpy as jnp
from torch_sinkhorn_attn.aot import attention as A
from torch_sinkhorn_attn.aot.bundles import compile_and_read, weighted
from torch_sinkhorn_attn.aot.chips import CHIPS
from torch_sinkhorn_attn.engines.tpu.method import run, choice
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
import torch_sinkhorn_attn.engines.tpu.wavefront.passes as wp
import torch_sinkhorn_attn.engines.tpu.wavefront.adjoint as wa
wp.resident_or_streamed=wa.resident_or_streamed=lambda s,r,t:r()
def main(gen,L,W,T,R=2,d=64,back=False):
    c=A.Configuration.of(dict(length=L,window=(W,W),base_iters=T,tail_iters=R,features=d))
    i,k,st=A.problem(c); lo=Lowering('wavefront',generation=gen)
    if not back: f=lambda i,k: run.forward(i,k,st,lo,residuals=False); args=[i,k]
    else:
        def f(i,k,o,u,v,g): return run.backward(i,k,st,lo,o,u,v,g)
        F=lambda *s: jax.ShapeDtypeStruct(s,'float32')
        args=[i,k,F(1,1,L,d),F(R+1,1,1,L),F(R+1,1,1,L),F(1,1,L,d)]
    try: r=compile_and_read(f,args,CHIPS[gen].topology)
    except Exception as e: print(gen,L,W,T,'ERR',str(e)[:600]); return
    for kk in r.kernels:
        w=3 if W<=128 else 2*W//128+1
        vec=L*w*128/1024
        print(gen,'L',L,'W',W,'T',T,kk.name,'vmem %.1f MiB'%(kk.vmem/2**20),'temp %.1f MiB'%(r.memory.temporaries/2**20))
        for l in kk.loops: print('   ','  '*l.depth,'bundles',l.bundles,'filled',l.filled,'skip',l.skippable,'trips',l.trips,{n:round(x,2) for n,x in l.slots.items() if x>.05})
        try: print('   weighted per vector', weighted(kk.loops)/vec)
        except Exception as e: print(e)
for a in sys.argv[1:]:
    x=a.split(','); main(x[0],*map(int,[y for y in x[1:] if y!="b"]),back="b" in x)
