"""`python -m iio_kernels`: what a bug report needs: versions, devices, and which backends serve here."""

import platform

import torch

import iio_kernels
from iio_kernels.runtime import build


def report() -> str:
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    facts = {
        "iio_kernels": iio_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": ", ".join(devices) or "no device",
    }
    for name, find in (("compiler", build.find_compiler), ("nvcc", build.find_nvcc)):
        try:
            compiler = find()
            facts[name] = f"{' '.join(compiler)}: {build.compiler_version(compiler)}"
        except build.BuildError as error:
            facts[name] = str(error)
    facts["cache"] = ", ".join(map(str, build.cache_folders()))
    facts["instruction set"] = build.instruction_set() or "kernels not loaded"
    facts |= {f"backend {name}": reason or "available" for name, reason in iio_kernels.backends().items()}
    return "\n".join(f"{name:20}{value}" for name, value in facts.items())


if __name__ == "__main__":
    print(report())
