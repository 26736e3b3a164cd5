//! Images that are damaged, foreign or too new, pids in use, a full disk, and resources that are not
//! supported: refused by name, with nothing built and nothing harmed.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};

use crcoord_common::image::{ImageRecord, Manifest, Record, SealingKey};
use crcoord_tests::binaries::installed;
use crcoord_tests::{DumpOptions, Ended, Program, Random, Sandbox, Specimen, eventually};

const LEAVE_RUNNING: DumpOptions = DumpOptions {
    leave_running: true,
    reset_external_tcp: false,
    kill_at_stop: 0,
};
/// Single bits that are turned in each file of an image, beside all of the manifest's header.
const FLIPS: u64 = 150;
/// The code of the report about an image that cannot be used.
const REFUSED: &str = "image-refused";
/// Where the fields of a manifest's header lie (FORMAT.md).
const MIN_READER: usize = 10;
const ARCHITECTURE: usize = 12;
const HEADER_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 32;

/// The image of a program that has ended, and damaged copies of it.
struct Images {
    specimen: Specimen,
    sandbox: Sandbox,
    manifest: Vec<u8>,
    pack: Vec<u8>,
}

impl Images {
    fn take() -> Images {
        let (specimen, sandbox) = (Specimen::new("pipes"), Sandbox::new());
        let pid = specimen.start(&sandbox);
        let image = specimen.beside("image");
        sandbox
            .dump(pid, &image, DumpOptions::default())
            .done("the image");
        sandbox.await_empty("the image");
        Images {
            manifest: fs::read(image.join("manifest")).unwrap(),
            pack: fs::read(image.join("pack")).unwrap(),
            specimen,
            sandbox: Sandbox::new(),
        }
    }

    fn write(&self, manifest: &[u8], pack: &[u8]) -> PathBuf {
        let image = self.specimen.beside("changed");
        fs::create_dir_all(&image).unwrap();
        fs::write(image.join("manifest"), manifest).unwrap();
        fs::write(image.join("pack"), pack).unwrap();
        image
    }

    /// Restores a changed image by an engine that would kill itself at its first traced stop: a
    /// refusal shows that no process was built.
    fn restore(&self, manifest: &[u8], pack: &[u8]) -> Ended {
        let image = self.write(manifest, pack);
        self.sandbox.restore_killed_at(&image, 1)
    }

    fn refuses(&self, what: &str, word: &str, manifest: &[u8], pack: &[u8]) {
        self.restore(manifest, pack).refused(what, word);
        assert!(self.sandbox.pids().is_empty(), "{what}");
    }

    /// The image as it was still restores.
    fn restores(&self) {
        let image = self.write(&self.manifest, &self.pack);
        self.sandbox.restore(&image).done("unchanged");
        self.specimen.verify("unchanged");
    }
}

/// The manifest with a right checksum after a change.
fn resealed(manifest: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut content = manifest[..manifest.len() - CHECKSUM_BYTES].to_vec();
    change(&mut content);
    let checksum = blake3::hash(&content);
    content.extend_from_slice(checksum.as_bytes());
    content
}

#[test]
fn damage_of_any_bit_is_found_before_a_process_is_built() {
    let images = Images::take();
    let mut random = Random::announced("bit flips");
    let (manifest, pack) = (&images.manifest, &images.pack);
    let header = (0..HEADER_BYTES as u64).map(|byte| (byte, 0));
    let anywhere = |random: &mut Random, length: usize| -> Vec<(u64, u64)> {
        (0..FLIPS)
            .map(|_| (random.below(length as u64), random.below(8)))
            .collect()
    };
    for (byte, bit) in header.chain(anywhere(&mut random, manifest.len())) {
        let mut damaged = manifest.clone();
        damaged[byte as usize] ^= 1 << bit;
        let what = format!("manifest, byte {byte}, bit {bit}");
        images.refuses(&what, REFUSED, &damaged, pack);
    }
    // Compressed bytes may say the same in another way: then nothing is damaged.
    let mut same = Vec::new();
    for (byte, bit) in anywhere(&mut random, pack.len()) {
        let mut damaged = pack.clone();
        damaged[byte as usize] ^= 1 << bit;
        let ended = images.restore(manifest, &damaged);
        if ended.was_killed() {
            same.push(damaged);
        } else {
            ended.refused(&format!("pack, byte {byte}, bit {bit}"), REFUSED);
        }
        images.sandbox.await_empty("a flip in the pack");
    }
    println!("{} of {FLIPS} flips in the pack change nothing", same.len());
    assert!((same.len() as u64) < FLIPS / 10);
    let pack = same.first().unwrap_or(pack);
    let image = images.write(manifest, pack);
    images.sandbox.restore(&image).done("the same content");
    images.specimen.verify("the same content");
}

#[test]
fn truncated_and_foreign_files_are_refused() {
    let images = Images::take();
    let mut random = Random::announced("truncations");
    let (manifest, pack) = (&images.manifest, &images.pack);
    for _ in 0..20 {
        let length = random.below(manifest.len() as u64) as usize;
        let what = format!("manifest of {length} bytes");
        images.refuses(&what, REFUSED, &manifest[..length], pack);
        let length = random.below(pack.len() as u64) as usize;
        let what = format!("pack of {length} bytes");
        images.refuses(&what, REFUSED, manifest, &pack[..length]);
    }
    let foreign = fs::read("/bin/true").unwrap();
    images.refuses(
        "a program as manifest",
        "not a crcoord manifest",
        &foreign,
        pack,
    );
    images.refuses("a program as pack", REFUSED, manifest, &foreign);
    let longer = [manifest.as_slice(), b"x"].concat();
    images.refuses("a longer manifest", REFUSED, &longer, pack);
    // The pack of another image, whole in itself.
    let other = Images::take();
    images.refuses("another image's pack", REFUSED, manifest, &other.pack);
    images.restores();
}

#[test]
fn what_another_or_newer_crcoord_wrote_is_refused_by_name() {
    let images = Images::take();
    let (manifest, pack) = (&images.manifest, &images.pack);
    let other = resealed(manifest, |bytes| bytes[ARCHITECTURE] = 2);
    images.refuses("aarch64", "Aarch64", &other, pack);
    let other = resealed(manifest, |bytes| bytes[ARCHITECTURE] = 77);
    images.refuses("unknown architecture", "architecture", &other, pack);
    let newer = resealed(manifest, |bytes| bytes[MIN_READER] = 2);
    images.refuses("newer container", "format 2", &newer, pack);

    let parsed = Manifest::decode_any(manifest, &SealingKey::Checksum).unwrap();
    let encode = |change: &dyn Fn(&mut Vec<Record>)| {
        let mut parsed = parsed.clone();
        change(&mut parsed.body.records);
        parsed.encode(&SealingKey::Checksum)
    };
    let kinds: std::collections::BTreeSet<_> =
        parsed.body.records.iter().map(|r| r.kind.clone()).collect();
    assert!(kinds.len() > 3, "{kinds:?}");
    for kind in &kinds {
        let newer = encode(&|records| {
            let record = records.iter_mut().find(|record| record.kind == *kind);
            record.unwrap().min_reader = 99;
        });
        images.refuses(&format!("newer {kind}"), kind, &newer, pack);
    }
    let unknown = encode(&|records| records.push(Record::encode(&Unknown(7))));
    images.refuses("unknown record", Unknown::KIND, &unknown, pack);
    images.restores();
}

/// A resource of tomorrow.
#[derive(serde::Serialize, serde::Deserialize)]
struct Unknown(u32);

impl ImageRecord for Unknown {
    const KIND: &'static str = "quantum-entanglement";
}

#[test]
fn a_pid_in_use_is_refused_by_name() {
    let (specimen, sandbox) = (Specimen::new("tree"), Sandbox::new());
    let pid = specimen.start(&sandbox);
    let image = specimen.beside("image");
    sandbox.dump(pid, &image, LEAVE_RUNNING).done("the image");
    let tree = sandbox.pids();
    let ended = sandbox.restore(&image);
    ended.refused("restored beside itself", &format!("pid {pid}"));
    assert_eq!(sandbox.pids(), tree);
    specimen.verify("restored beside itself");
}

#[test]
fn a_full_disk_ends_the_dump_and_not_the_program() {
    // More memory that does not compress than the disk has room for.
    const SCRIPT: &str = "import os, sys, time, hashlib\n\
        data = os.urandom(8 << 20)\n\
        before = hashlib.sha256(data).digest()\n\
        open('ready', 'w').close()\n\
        while not os.path.exists('go'): time.sleep(0.002)\n\
        assert hashlib.sha256(data).digest() == before\n\
        open('result', 'w').close()\n";
    let python = installed("/usr/bin/python3", "python3");
    let directory = tempfile::tempdir().unwrap();
    let sandbox = Sandbox::new();
    let program = Program::new(python, directory.path()).arguments(["-c", SCRIPT]);
    let pid = sandbox.start(&program);
    let file = |name: &str| directory.path().join(name);
    eventually("the program is ready", || file("ready").exists());
    let disk = file("disk");
    fs::create_dir(&disk).unwrap();
    let status = sandbox
        .command("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&disk)
        .status()
        .unwrap();
    assert!(status.success());
    for (number, options) in [LEAVE_RUNNING, DumpOptions::default()]
        .into_iter()
        .enumerate()
    {
        let image = disk.join(number.to_string());
        let ended = sandbox.dump(pid, &image, options);
        assert!(!ended.status.success(), "{}", ended.said);
        assert!(ended.said.contains("space"), "{}", ended.said);
        sandbox.assert_runs("the disk is full");
        assert_eq!(sandbox.pids().len(), 1, "the program, and no copy of it");
        assert!(!holds_image(&sandbox.outside(&image)), "{}", ended.said);
    }
    fs::write(file("go"), "").unwrap();
    eventually("the program verifies itself", || file("result").exists());
    sandbox.await_empty("the disk is full");
}

/// Whether anything of an image lies there.
fn holds_image(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    entries.flatten().next().is_some()
}

/// Opens what is not supported, says which descriptors these are, and waits.
const UNSUPPORTED: &str = r#"
import ctypes, os, socket, time
libc = ctypes.CDLL(None, use_errno=True)
found = []
def tell(fd, word):
    os.set_inheritable(fd, True)
    found.append(f'{fd} {word}')
pair = socket.socketpair()
tell(pair[0].fileno(), 'socket'); tell(pair[1].fileno(), 'socket')
listening = socket.socket(socket.AF_UNIX); listening.bind('socket'); listening.listen()
tell(listening.fileno(), 'socket')
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tell(udp.fileno(), 'socket')
os.mkfifo('fifo')
tell(os.open('fifo', os.O_RDWR), 'fifo')
deleted = os.open('deleted', os.O_CREAT | os.O_RDWR); os.unlink('deleted')
tell(deleted, 'deleted')
tell(libc.inotify_init1(0), 'inotify')
ring = libc.syscall(425, 4, ctypes.create_string_buffer(120))
if ring >= 0:
    tell(ring, 'io_uring')
else:
    print('io_uring is off here: not tested', flush=True)
with open('ready.new', 'w') as ready:
    ready.write('\n'.join(found))
os.rename('ready.new', 'ready')
while not os.path.exists('go'):
    time.sleep(0.002)
pair[0].send(b'x')
assert pair[1].recv(1) == b'x'
open('result', 'w').close()
"#;

#[test]
fn everything_unsupported_is_listed_at_once_with_its_place_and_a_remedy() {
    let python = installed("/usr/bin/python3", "python3");
    let directory = tempfile::tempdir().unwrap();
    let sandbox = Sandbox::new();
    let program = Program::new(python, directory.path()).arguments(["-c", UNSUPPORTED]);
    let pid = sandbox.start(&program);
    let file = |name: &str| directory.path().join(name);
    eventually("the program is ready", || file("ready").exists());
    let listed = fs::read_to_string(file("ready")).unwrap();
    assert!(listed.lines().count() >= 7, "{listed}");
    let image = file("image");
    // No stop is reached: nothing was frozen.
    let options = DumpOptions {
        kill_at_stop: 1,
        ..DumpOptions::default()
    };
    let ended = sandbox
        .dump(pid, &image, options)
        .refused("unsupported", &format!("pid {pid}"));
    for line in listed.lines() {
        let (fd, word) = line.split_once(' ').unwrap();
        let place = format!("pid {pid} fd {fd} ");
        let told = ended.said.lines().find(|line| line.contains(&place));
        let told = told.unwrap_or_else(|| panic!("no {place}({word}) in: {}", ended.said));
        assert!(told.to_lowercase().contains(word), "{word}: {told}");
        assert!(told.contains(" path "), "{word} without path: {told}");
        assert!(told.contains(" -> "), "{word} without remedy: {told}");
    }
    assert!(!holds_image(&image));
    sandbox.assert_runs("refused");
    fs::write(file("go"), "").unwrap();
    eventually("the program goes on", || file("result").exists());
}
