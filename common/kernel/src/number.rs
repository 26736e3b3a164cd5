//! Numbers of the system calls that are run in other processes, and flags that go with them, for
//! crates that do not use libc themselves.

macro_rules! numbers {
    ($($name:ident = $libc:ident;)*) => {
        $(
            #[doc = concat!("`", stringify!($libc), "`")]
            pub const $name: i64 = libc::$libc;
        )*
    };
}

numbers! {
    SYS_BRK = SYS_brk;
    SYS_CAPSET = SYS_capset;
    SYS_CLOSE = SYS_close;
    SYS_CLOSE_RANGE = SYS_close_range;
    SYS_DUP3 = SYS_dup3;
    SYS_EPOLL_CTL = SYS_epoll_ctl;
    SYS_EPOLL_WAIT = SYS_epoll_wait;
    SYS_EXIT = SYS_exit;
    SYS_EXIT_GROUP = SYS_exit_group;
    SYS_FCHDIR = SYS_fchdir;
    SYS_FCNTL = SYS_fcntl;
    SYS_GETITIMER = SYS_getitimer;
    SYS_KILL = SYS_kill;
    SYS_MADVISE = SYS_madvise;
    SYS_MLOCK2 = SYS_mlock2;
    SYS_MMAP = SYS_mmap;
    SYS_MPROTECT = SYS_mprotect;
    SYS_MREMAP = SYS_mremap;
    SYS_MUNMAP = SYS_munmap;
    SYS_PERSONALITY = SYS_personality;
    SYS_PRCTL = SYS_prctl;
    SYS_PRLIMIT64 = SYS_prlimit64;
    SYS_RSEQ = SYS_rseq;
    SYS_RT_SIGACTION = SYS_rt_sigaction;
    SYS_RT_SIGQUEUEINFO = SYS_rt_sigqueueinfo;
    SYS_RT_TGSIGQUEUEINFO = SYS_rt_tgsigqueueinfo;
    SYS_SCHED_SETSCHEDULER = SYS_sched_setscheduler;
    SYS_SET_ROBUST_LIST = SYS_set_robust_list;
    SYS_SET_TID_ADDRESS = SYS_set_tid_address;
    SYS_SETGID = SYS_setgid;
    SYS_SETGROUPS = SYS_setgroups;
    SYS_SETITIMER = SYS_setitimer;
    SYS_SETNS = SYS_setns;
    SYS_SETPGID = SYS_setpgid;
    SYS_SETPRIORITY = SYS_setpriority;
    SYS_SETRESGID = SYS_setresgid;
    SYS_SETRESUID = SYS_setresuid;
    SYS_SETFSGID = SYS_setfsgid;
    SYS_SETFSUID = SYS_setfsuid;
    SYS_SETSID = SYS_setsid;
    SYS_SIGALTSTACK = SYS_sigaltstack;
    SYS_UMASK = SYS_umask;
}

/// Constants of mmap(2), prctl(2), clone(2) and others, as 64-bit arguments.
pub mod flag {
    macro_rules! flags {
        ($($name:ident)*) => {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub const $name: u64 = libc::$name as u64;
            )*
        };
    }
    flags! {
        PROT_READ PROT_WRITE PROT_EXEC
        MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS MAP_FIXED MAP_GROWSDOWN MAP_NORESERVE
        MREMAP_MAYMOVE MREMAP_FIXED
        MADV_DONTFORK MADV_WIPEONFORK MADV_DONTDUMP MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_MERGEABLE
        MADV_SEQUENTIAL MADV_RANDOM
        CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_THREAD CLONE_SYSVSEM CLONE_PARENT
        PR_SET_NAME PR_SET_DUMPABLE PR_GET_DUMPABLE PR_SET_PDEATHSIG PR_GET_PDEATHSIG
        PR_SET_NO_NEW_PRIVS PR_GET_TID_ADDRESS PR_SET_MM PR_SET_MM_MAP
        PR_GET_CHILD_SUBREAPER PR_SET_CHILD_SUBREAPER PR_GET_KEEPCAPS PR_SET_KEEPCAPS
        PR_GET_TIMERSLACK PR_SET_TIMERSLACK PR_GET_SECUREBITS
        EPOLL_CTL_ADD EPOLL_CTL_MOD
        SIGKILL SIGSTOP SIGTRAP SIGCHLD
        RLIMIT_NOFILE
    }
}
