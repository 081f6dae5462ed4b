"""What `jaxsynth --help` and the verbs' --help say beside their flags."""

DESCRIPTION = "Make, adapt and judge synthetic training data in JAX."
EPILOG = """\
examples:
  jaxsynth run --config=configs/datadream.py:tiny --workdir=runs/demo
  jaxsynth plan --config=configs/diffscaler.py:xl2 --devices=8 --fsdp=4
  jaxsynth report runs/demo
  jaxsynth generate --base=tiny --prompt="a photo of the digit three" --out=images
  jaxsynth bench train-step --peer=torch
  jaxsynth run --help

environment:
  JAXSYNTH_CACHE     where compiled programs are kept, so that the next run starts faster
                     (default ~/.cache/jaxsynth/programs; "off" keeps none)
  MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1
                     glibc keeps freed memory, which saves a fifth of large steps on a CPU
                     (launch/demo.sh sets them)
  JAX_PLATFORMS      the devices to use: cpu, cuda or tpu (default: the fastest there is)
  HF_HUB_OFFLINE=1   never ask the Hugging Face hub; use only what was fetched before
"""
RUN_EPILOG = """\
A run is a row of stages, each with a folder below --workdir. The same command goes on where it
stopped: finished stages are skipped, one that was interrupted resumes. A changed field is refused
by name where a stage was made with the old value.

config fields:
  --config.FIELD=VALUE sets a field of the config, --config.A.B=VALUE one of a part of it. A list
  is written 1,4,16 and an empty value is "none". `jaxsynth fields FILE[:VARIANT]`, or --help
  beside --config, lists them all.

examples:
  jaxsynth run --config=configs/datadream.py:tiny --workdir=runs/demo --config.shots=4
  jaxsynth run --config=configs/datadream.py:sd21 --workdir=runs/pets \\
      --config.data.source=folder --config.data.path=photos/

a machine that may be taken away with its disk:
  --mirror=gs://BUCKET/runs/NAME copies what changes to a bucket every minute; the same command on
  another machine, with an empty --workdir, goes on from there (pip install 'jaxsynth[gcs]').

several machines (the same command on each):
  --distributed finds the others by itself on a Cloud TPU pod, SLURM, Open MPI or Kubernetes;
  elsewhere give --coordinator_address, --num_processes and --process_id, or set
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""
CONVERT_EPILOG = """\
formats of an adapter, all of which are read too:
  peft         a folder with adapter_config.json and adapter_model.safetensors; one such folder
               for each network when there are several
  diffusers    pytorch_lora_weights.safetensors, for pipeline.load_lora_weights; LoRA and DoRA, and
               other low-rank kinds (LoHa, LoKr, VeRA, ...) as the LoRA that they are
  kohya        one .safetensors of LoRA, other low-rank kinds as the LoRA that they are
  lycoris      one .safetensors of LoRA, DoRA, LoHa, LoKr, GLoRA, (IA)^3 or full differences
  comfyui      the same in ComfyUI's spelling, DoRA for the norms by which it divides
  a1111        a hypernetwork's .pt
  jaxsynth     adapter.safetensors, any kind, as `jaxsynth run` writes what is no LoRA

  All but peft and diffusers to each other and to jaxsynth need --base, the Stable Diffusion that
  the adapter is for: its layers' names and sizes. What a file leaves open is said.

formats of a whole Stable Diffusion (1.x, 2.x, XL):
  diffusers    a pipeline's folder, from a checkpoint in one file; --base=FOLDER has its tokenizer
  comfyui      one .safetensors, from a pipeline's folder; a1111 is the same

formats of motion modules (AnimateDiff):
  diffusers    a folder of a MotionAdapter
  comfyui      one .safetensors or .ckpt in the authors' names; --base tells the groups of norms
               that are not the published 32

formats of an image store:
  imagefolder  a folder per class, for torchvision and Hugging Face datasets
  webdataset   numbered tar files
  parquet      numbered Parquet files with an image column, for Hugging Face datasets
"""
BENCH_EPILOG = """\
Both sides load the same random weights, and are timed only after they have computed the same. Run
it on an idle machine: no ratio is given where other processes had a tenth of the cores' time
meanwhile, or where the measurements of one side differ too much.

benchmarks:
  train-step      one LoRA update of the Stable Diffusion networks
  generate        a batch of images sampled from them
  dit-train-step  one update of DiffScaler's Affiners on a diffusion transformer (DiT)
  supervised-step one update of a vision transformer from scratch
  clones          one update of StableRep, SynCLR or SynCLIP, and of SimCLR; both sides are ours
  points          one update of ten points of a scaling study in one program, and in turn; both
                  sides are ours
  routing         drawing a batch that mixes three sets of Affiners, and the same with one set;
                  both sides are ours
  adapters        one update of DoRA, LoHa or LoKr, and the same of LoRA; both sides are ours
  attacks         PGD of 20 steps; --peer=foolbox or torchattacks
  corruptions     ImageNet-C's 19 corruptions; --peer=imagecorruptions
  accelerator     Stable Diffusion 2.1 at 512 pixels in bfloat16 (a step of one LoRA, of ten, 16
                  images), PGD and corruptions, with MFU; --peer=torch (compiled) on the same GPU;
                  on a CPU the shipped base instead

cases of train-step and generate:
  tiny            the shipped 32x32 base; batches of 8 (train-step) or 20 images (generate)
  tiny-cls        the same with 10 adapters at once, which torch takes one after the other
  sd-shaped       Stable Diffusion 2 at half its width, 32x32 latents

cases of dit-train-step and routing:
  tiny            the small DiT of configs/diffscaler.py, 8x8 latents
  dit-s2, dit-b2  DiT-S/2 and DiT-B/2 (the latter in dit-train-step only), 32x32 latents

cases of supervised-step: tiny (32x32 pixels), vit-s16 (ViT-S/16, batches of 8 at 224x224)
cases of clones: "tiny stablerep", "tiny synclr", "tiny synclip", "vit-s16 synclr"
cases of points: tiny (the network of configs/scaling.py), small

cases of adapters, rank 8:
  "dit-s2 dora" ...     on the linear layers of DiT-S/2
  "sd-shaped dora" ...  on the linear layers and convolutions of that UNet

cases of accelerator: sd21, sd21-cls, sd21-generate, resnet20, "all 19"; toy, toy-cls, ...

cases of attacks, 32x32 pixels:
  mlp, resnet20   classifiers, 256 and 32 images
  convolutions    those of resnet20 and nothing else
cases of corruptions: "all 19", or one by name; 8 images of 224x224, severity 3

environment:
  XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,\
LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION
              lets XLA take other CPU kernels; faster in some cases only, so not the default
"""
