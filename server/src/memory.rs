//! How much memory there is to use: the machine's, or what a container may still take.

use std::path::Path;

/// Bytes that can still be used without pushing others out; `None` where the platform doesn't say.
pub fn available_bytes() -> Option<usize> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_available(&text));
    let container = cgroup_available(Path::new("/sys/fs/cgroup"), &["memory.max", "memory.current"])
        .or_else(|| cgroup_available(Path::new("/sys/fs/cgroup/memory"), &["memory.limit_in_bytes", "memory.usage_in_bytes"]));
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

fn meminfo_available(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib * 1024)
}

/// Limit less usage; page cache that the kernel would give back (`inactive_file`) counts as free. No limit = `None`.
fn cgroup_available(directory: &Path, [limit, usage]: &[&str; 2]) -> Option<usize> {
    let number = |file: &str| std::fs::read_to_string(directory.join(file)).ok()?.trim().parse::<usize>().ok();
    let limit = number(limit).filter(|l| *l < 1 << 60)?;
    let stat = std::fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<usize>().ok()).unwrap_or(0);
    Some((limit + reclaimable).saturating_sub(number(usage)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_without_a_limit_has_none() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "1000\n");
        let files = ["memory.max", "memory.current"];
        assert_eq!(cgroup_available(directory.path(), &files), None);
        write("memory.max", "5000\n");
        assert_eq!(cgroup_available(directory.path(), &files), Some(4000));
        write("memory.stat", "anon 700\ninactive_file 300\n");
        assert_eq!(cgroup_available(directory.path(), &files), Some(4300));
    }

    #[test]
    fn the_machine_says_what_is_available() {
        assert_eq!(meminfo_available("MemTotal:  10 kB\nMemAvailable:   3 kB\n"), Some(3072));
        assert_eq!(meminfo_available("MemTotal:  10 kB\n"), None);
    }
}
