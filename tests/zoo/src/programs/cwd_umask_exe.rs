//! What a process is beside its memory: directories, mask, names, vectors, limits, priorities, flags.

use std::collections::BTreeMap;
use std::{env, fs};

use crcoord_zoo::descriptors::checked;
use crcoord_zoo::{Explain, Outcome, Stage, ensure, ensure_equal, tasks};

const UMASK: libc::mode_t = 0o137;

pub fn run(stage: &Stage) -> Outcome {
    let directory = stage.file("directory");
    fs::create_dir(&directory).explain(directory.display())?;
    env::set_current_dir(&directory).explain("chdir")?;
    // SAFETY: umask has no memory arguments and cannot fail.
    unsafe { libc::umask(UMASK) };
    // Spaces and a parenthesis: the classic trap for readers of /proc/PID/stat.
    tasks::set_name(c"zoo) R 1 (x");
    lower_limits()?;
    change_flags()?;
    let before = everything()?;
    stage.ready()?;
    stage.wait_for_go();

    let after = everything()?;
    for (name, value) in &before {
        ensure_equal!(after.get(name), Some(value), "{name}");
    }
    fs::write("relative", "x").explain("writing a relative path")?;
    ensure!(
        directory.join("relative").exists(),
        "a relative path leads elsewhere"
    );
    let mode = fs::metadata("relative").explain("stat")?;
    let mode = std::os::unix::fs::MetadataExt::mode(&mode) & 0o777;
    ensure_equal!(mode, 0o666 & !UMASK, "mode of a new file under the umask");
    Ok(())
}

/// Soft limits below what they were.
fn lower_limits() -> Outcome {
    for (resource, soft) in [
        (libc::RLIMIT_NOFILE, 777),
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_STACK, 6 << 20),
    ] {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the limit is valid for writing.
        checked(unsafe { libc::getrlimit(resource, &mut limit) }).explain("getrlimit")?;
        limit.rlim_cur = limit.rlim_max.min(soft);
        // SAFETY: the limit is valid.
        checked(unsafe { libc::setrlimit(resource, &limit) }).explain("setrlimit")?;
    }
    Ok(())
}

/// Everything here is allowed without privileges.
fn change_flags() -> Outcome {
    // SAFETY: none of these calls has memory arguments.
    let results = unsafe {
        [
            libc::setpriority(libc::PRIO_PROCESS, 0, 3),
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_TIMERSLACK, 77_777, 0, 0, 0),
            libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong),
        ]
    };
    ensure!(
        results.iter().all(|&result| result >= 0),
        "setting process flags: {results:?}"
    );
    Ok(())
}

/// All that must be the same afterwards, by name.
fn everything() -> Outcome<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    let mut put = |name: &str, value: String| all.insert(name.to_owned(), value);
    let link = |name: &str| {
        fs::read_link(name)
            .explain(name)
            .map(|to| to.display().to_string())
    };
    put(
        "getcwd",
        env::current_dir().explain("getcwd")?.display().to_string(),
    );
    put("/proc/self/cwd", link("/proc/self/cwd")?);
    put("/proc/self/exe", link("/proc/self/exe")?);
    put("/proc/self/root", link("/proc/self/root")?);
    for name in ["cmdline", "environ", "auxv", "comm"] {
        let path = format!("/proc/self/{name}");
        let content = fs::read(&path).explain(&path)?;
        ensure!(!content.is_empty(), "{path} is empty");
        put(&path, format!("{content:?}"));
    }
    put("argv", format!("{:?}", env::args().collect::<Vec<_>>()));
    put(
        "environ in memory",
        format!("{:?}", env::vars_os().collect::<Vec<_>>()),
    );
    for name in [
        libc::AT_PAGESZ,
        libc::AT_PHDR,
        libc::AT_ENTRY,
        libc::AT_RANDOM,
        libc::AT_HWCAP,
    ] {
        // SAFETY: getauxval has no memory arguments.
        put(
            &format!("getauxval {name}"),
            unsafe { libc::getauxval(name) }.to_string(),
        );
    }
    let status = fs::read_to_string("/proc/self/status").explain("/proc/self/status")?;
    let kept = [
        "Name",
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NoNewPrivs",
        "CapInh",
        "CapPrm",
        "CapEff",
    ];
    for line in status.lines() {
        if let Some((name, value)) = line.split_once(':')
            && kept.contains(&name)
        {
            put(&format!("status {name}"), value.trim().to_owned());
        }
    }
    put(
        "limits",
        fs::read_to_string("/proc/self/limits").explain("/proc/self/limits")?,
    );
    let numbers = [
        // SAFETY: no memory arguments, and nothing is changed.
        ("dumpable", unsafe {
            libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0)
        }),
        // SAFETY: see above.
        ("no_new_privs", unsafe {
            libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
        }),
        // SAFETY: see above.
        ("timer slack", unsafe {
            libc::prctl(libc::PR_GET_TIMERSLACK, 0, 0, 0, 0)
        }),
        // SAFETY: see above.
        ("nice value", unsafe {
            libc::getpriority(libc::PRIO_PROCESS, 0)
        }),
        // SAFETY: the special value asks without changing.
        ("personality", unsafe { libc::personality(0xffff_ffff) }),
    ];
    for (name, value) in numbers {
        put(name, value.to_string());
    }
    Ok(all)
}
