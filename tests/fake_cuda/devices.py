"""Properties of the GPUs that can be faked, with the names of torch.cuda.get_device_properties."""

from types import SimpleNamespace

_COMMON = dict(
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 * 1024,
    is_integrated=0,
    is_multi_gpu_board=0,
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
    uuid="GPU-fake",
    gcnArchName="",
)

DEVICES = {
    "H200": SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=141 * 2**30,
        shared_memory_per_block_optin=227 * 1024,
        shared_memory_per_multiprocessor=228 * 1024,
        L2_cache_size=50 * 2**20,
        clock_rate=1980000,
        memory_clock_rate=3201000,
        memory_bus_width=6144,
        **_COMMON,
    ),
    "A100": SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        multi_processor_count=108,
        total_memory=80 * 2**30,
        shared_memory_per_block_optin=163 * 1024,
        shared_memory_per_multiprocessor=164 * 1024,
        L2_cache_size=40 * 2**20,
        clock_rate=1410000,
        memory_clock_rate=1593000,
        memory_bus_width=5120,
        **_COMMON,
    ),
}
