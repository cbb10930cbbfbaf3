//! Devices and number types by name, and how many threads there really are.

use crate::{Error, Result, WeightType};
use candle_core::{DType, Device};
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

/// What `--device` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first CUDA device if this build and machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of that number; an error if it can't be had.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected cpu, cuda, cuda:N or auto, found {text:?}")),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] when CUDA is asked for and this build or machine has none.
    pub fn open(self) -> Result<Device> {
        let built = candle_core::utils::cuda_is_available();
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !built => {
                Err(Error::Device("this build has no CUDA support: build with `--features cuda` (docs/cuda.md), or use --device cpu".into()))
            }
            Self::Cuda(n) => cuda(n).map_err(|e| Error::Device(format!("CUDA device {n} can't be opened: {e}"))),
            Self::Auto if built => Ok(cuda(0).unwrap_or(Device::Cpu)),
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

/// A CUDA device with one stream of its own, on which everything happens in order, whichever thread asks for it.
///
/// It is never closed, but given to the next who asks when nobody has it any more: closing one waits for all that the GPU does, which can't be while
/// another one's graph is recorded.
#[cfg(feature = "cuda")]
fn cuda(number: usize) -> candle_core::Result<Device> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    use std::sync::{Arc, Mutex};

    static OPENED: Mutex<Vec<(usize, Device)>> = Mutex::new(Vec::new());
    let _not_recording = not_recording();
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    for (_, device) in opened.iter().filter(|(of, _)| *of == number) {
        // every copy of a device holds this, all its tensors among them; here are two
        if Arc::strong_count(&device.as_cuda_device()?.cublas_handle()) == 2 {
            return Ok(device.clone());
        }
    }
    let device = Device::new_cuda_with_stream(number)?;
    let of = device.as_cuda_device()?;
    // SAFETY: events order what several streams do with one tensor; tensors of this device are used on its one stream only
    unsafe { of.disable_event_tracking() };
    // memory that was freed stays with the process; by default the system gets it back whenever the GPU is waited for
    let mut keep = u64::MAX;
    let stream = of.cuda_stream();
    // SAFETY: the attribute is a number of 64 bits
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
        result::mem_pool::set_attribute(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut keep).cast()).w()?;
    }
    opened.push((number, device.clone()));
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda(number: usize) -> candle_core::Result<Device> {
    Device::new_cuda(number)
}

/// Held while a graph is recorded.
static RECORDING: RwLock<()> = RwLock::new(());

/// Waits until nobody else uses a GPU's streams, and keeps them away.
#[cfg(feature = "flash-attn")]
pub(crate) fn recording() -> impl Drop {
    RECORDING.write().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps graphs from being recorded for as long as the result lives. For whoever uses a model's device on another thread than the one that serves it: what he
/// launches would become part of the graph.
#[must_use]
pub fn not_recording() -> impl Drop {
    RECORDING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a GPU known to this thread. Tensors are freed on the thread that drops them, which may have had nothing to do with it before.
pub fn bind_thread(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Ok(device) = device.as_cuda_device()
        && let Err(error) = device.cuda_stream().context().bind_to_thread()
    {
        tracing::warn!(%error, "a thread has no access to the GPU: memory isn't freed");
    }
    let _ = device;
}

/// What to hold a model's matrices in: `None` picks f32 on the CPU and bf16 on CUDA. On the CPU sums, activations and caches are f32 whatever it is.
///
/// # Errors
/// [`Error::Device`] for a type that the device can't compute with.
pub fn weight_type(device: &Device, asked: Option<WeightType>) -> Result<WeightType> {
    match asked {
        None if device.is_cpu() => Ok(DType::F32.into()),
        None => Ok(DType::BF16.into()),
        Some(of @ WeightType::Plain(DType::F32 | DType::BF16 | DType::F16)) => Ok(of),
        Some(WeightType::Plain(of)) => Err(Error::Device(format!("no model is computed in {}: expected f32, bf16 or f16", of.as_str()))),
        Some(of) if device.is_cpu() => Ok(of),
        Some(WeightType::Stored) => Err(Error::Device("a file's own types are multiplied on the CPU only: expected f32, f16 or bf16 on CUDA".into())),
        Some(of) => Err(Error::Device(format!("{} is multiplied on the CPU only: expected f32, f16 or bf16 on CUDA", of.as_str()))),
    }
}

/// Threads that may run at once: the container's CPU quota where there is one, else the cores.
pub fn available_threads() -> usize {
    // std asks sched_getaffinity and the cgroup's cpu.max
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Sets the size of the tensor library's thread pool. Must run before the first tensor operation, on the main thread.
pub fn set_threads(threads: usize) {
    for variable in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: called at the start of main, before any other thread exists
        unsafe { std::env::set_var(variable, threads.max(1).to_string()) };
    }
}
