//! Compiles the GPU kernels to PTX, where the feature `cuda` is on.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    {
        let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("ptx.rs");
        cudaforge::KernelBuilder::new().source_dir("src/cuda").arg("-std=c++17").arg("-O3").build_ptx()?.write(out)?;
    }
    Ok(())
}
