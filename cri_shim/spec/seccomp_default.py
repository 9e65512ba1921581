"""The RuntimeDefault seccomp profile: an allow-list of system calls, as Linux 6.x has them.

Not the loading: the OCI runtime does that and skips names that its libseccomp does not know. Invariant: what is not
listed fails with EPERM; what a capability guards in the kernel is allowed only together with that capability, since a
filter then adds nothing but a second, earlier refusal.

Left out on purpose, because of their history of kernel defects or because they are not namespaced: io_uring, the kernel
keyring, userfaultfd, kexec, swap, move_pages, and the obsolete module and sysctl calls.
"""

from __future__ import annotations

import errno
from typing import Final

from cri_shim.spec.facts import Json

# By subject, so that a reader can judge the list.
_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync
file_getattr file_setattr flock fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd
getdents getdents64 inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown lchown32 link linkat
listmount _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2
pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename renameat renameat2
rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range
syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev
"""
_ATTRIBUTES = """
fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr
lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat
"""
_EVENTS = """
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect pipe pipe2 poll
ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64
timerfd_settime timerfd_settime64
"""
_MEMORY = """
brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2
mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages
"""
_PROCESSES = """
capget capset execve execveat exit exit_group fork getcpu getegid getegid32 geteuid geteuid32 getgid getgid32
getgroups getgroups32 getitimer getpgid getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32
getrlimit getrusage getsid gettid getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lsm_get_self_attr lsm_list_modules nice pause pidfd_open pidfd_send_signal prctl prlimit64
process_mrelease ptrace restart_syscall rseq sched_get_priority_max sched_get_priority_min sched_getaffinity
sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity
sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setfsgid setfsgid32 setfsuid setfsuid32 setgid
setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sysinfo tgkill times tkill ugetrlimit uname vfork
wait4 waitid waitpid
"""
_THREADS = """
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list get_thread_area set_robust_list
set_thread_area set_tid_address
"""
_SIGNALS = """
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack signal sigpending sigprocmask sigreturn sigsuspend
"""
_TIME = """
adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 gettimeofday nanosleep time timer_create timer_delete timer_getoverrun
timer_gettime timer_gettime64 timer_settime timer_settime64
"""
_NETWORK = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 recvmsg
send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair
"""
_IPC = """
getrandom ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64
mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget
"""

_ALWAYS: Final = tuple(
    name
    for subject in (*(_FILES, _ATTRIBUTES, _EVENTS, _MEMORY, _PROCESSES, _THREADS, _SIGNALS, _TIME, _NETWORK, _IPC),)
    for name in subject.split()
)

_WITH_CAPABILITY: Final = {
    "BPF": "bpf",
    "DAC_READ_SEARCH": "open_by_handle_at",
    "PERFMON": "perf_event_open",
    "SYS_ADMIN": (
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_set_self_attr mount "
        "mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd setdomainname "
        "sethostname setns syslog umount umount2 unshare"
    ),
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "delete_module finit_module init_module",
    "SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev",
    "SYS_RAWIO": "ioperm iopl",
    "SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "SYS_TTY_CONFIG": "vhangup",
    "SYSLOG": "syslog",
}

_OF_MACHINE: Final = {
    "x86_64": (("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"), "arch_prctl modify_ldt uretprobe"),
    "aarch64": (
        ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
        "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    ),
    "riscv64": (("SCMP_ARCH_RISCV64",), "riscv_flush_icache riscv_hwprobe"),
    "ppc64le": (("SCMP_ARCH_PPC64LE",), "sync_file_range2 swapcontext"),
    "s390x": (("SCMP_ARCH_S390X", "SCMP_ARCH_S390"), "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
}

# linux/sched.h: every CLONE_NEW* flag of clone(2) but CLONE_NEWTIME, which clone(2) does not take.
_CLONE_NAMESPACES: Final = 0x7E020000
# linux/personality.h: PER_LINUX, PER_LINUX32, each also with UNAME26, and the query.
_PERSONALITIES: Final = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_AF_VSOCK: Final = 40


def default_profile(capabilities: frozenset[str], machine: str) -> Json:
    """`linux.seccomp` (OCI runtime-spec, config-linux) for a process with these capabilities (names without CAP_).

    `machine` as uname(2) says it; on one that is not known here only its own system calls are filtered.
    """
    architectures, special = _OF_MACHINE.get(machine, ((), ""))
    guarded = {
        name for capability, names in _WITH_CAPABILITY.items() if capability in capabilities for name in names.split()
    }
    rules = [_allow((*_ALWAYS, *special.split(), *sorted(guarded))), _socket(), *_personalities()]
    if "SYS_ADMIN" not in capabilities:
        rules += [_clone(machine), _clone3()]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        **({"architectures": list(architectures)} if architectures else {}),
        "syscalls": rules,
    }


def _allow(names: tuple[str, ...], *conditions: Json) -> Json:
    rule: Json = {"names": list(names), "action": "SCMP_ACT_ALLOW"}
    return {**rule, "args": list(conditions)} if conditions else rule


def _condition(index: int, value: int, operator: str, value_two: int = 0) -> Json:
    return {"index": index, "value": value, "valueTwo": value_two, "op": operator}


def _socket() -> Json:
    """A vsock reaches the hypervisor's side, past every network namespace."""
    return _allow(("socket",), _condition(0, _AF_VSOCK, "SCMP_CMP_NE"))


def _personalities() -> list[Json]:
    return [_allow(("personality",), _condition(0, value, "SCMP_CMP_EQ")) for value in _PERSONALITIES]


def _clone(machine: str) -> Json:
    """No new namespaces; on s390 the flags are the second argument (clone(2), C library/kernel differences)."""
    flags = 1 if machine == "s390x" else 0
    return _allow(("clone",), _condition(flags, _CLONE_NAMESPACES, "SCMP_CMP_MASKED_EQ"))


def _clone3() -> Json:
    """Its flags are behind a pointer, which no filter can read: ENOSYS makes the C library fall back to clone(2)."""
    return {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}
