//! What strace has written down, as calls in the order in which they began and returned.

use std::collections::HashMap;
use std::path::Path;

/// The calls that change files or make them safe, and those that bring a request or let an answer out. Those that
/// nobody makes are recorded so that it is noticed if somebody does.
pub(super) const CALLS: &str = "trace=openat,open,creat,close,pwrite64,write,writev,pwritev,pwritev2,\
                                ftruncate,truncate,fallocate,\
                                rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,mkdir,\
                                fsync,fdatasync,sync,syncfs,sync_file_range,copy_file_range,sendfile,splice,\
                                recvfrom,recvmsg,read,readv,sendto,sendmsg,dup,dup2,dup3";

/// A string of this length is shown whole.
pub(super) const SHOWN: &str = "65536";

/// One call of the system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) name: String,
    /// What stands between the brackets, with all strings in hexadecimal.
    pub(super) arguments: String,
    /// What stands behind `=`; `None` if it never returned.
    pub(super) result: Option<String>,
}

/// A call has begun, or has returned; by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Begins(usize),
    Returns(usize),
}

/// A trace of one process.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) calls: Vec<Call>,
    pub(super) moments: Vec<Moment>,
}

impl Trace {
    pub(super) fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read_to_string(path).unwrap())
    }

    fn parse(text: &str) -> Self {
        let mut trace = Self::default();
        // By thread: it is in one call at a time.
        let mut under_way: HashMap<&str, usize> = HashMap::new();
        for line in text.lines() {
            let (thread, what) = line.split_once(' ').unwrap();
            let what = what.trim_start();
            if what.starts_with("+++") || what.starts_with("---") {
                continue;
            }
            if let Some(resumed) = what.strip_prefix("<... ") {
                let call = under_way.remove(thread).unwrap_or_else(|| panic!("{line}"));
                let (name, rest) = resumed.split_once(" resumed>").unwrap();
                assert_eq!(name, trace.calls[call].name, "{line}");
                trace.returns(call, rest);
                continue;
            }
            let (name, rest) = what.split_once('(').unwrap_or_else(|| panic!("{line}"));
            let call = trace.calls.len();
            trace.calls.push(Call { name: name.to_owned(), ..Call::default() });
            trace.moments.push(Moment::Begins(call));
            match rest.strip_suffix(" <unfinished ...>") {
                Some(begun) => {
                    trace.calls[call].arguments.push_str(begun);
                    under_way.insert(thread, call);
                }
                None => trace.returns(call, rest),
            }
        }
        trace
    }

    fn returns(&mut self, call: usize, rest: &str) {
        let (arguments, result) = rest.rsplit_once(") ").unwrap_or_else(|| panic!("no end of a call: {rest}"));
        let result = result.trim_start().strip_prefix("= ").unwrap();
        self.calls[call].arguments.push_str(arguments);
        // Of a process that was killed: `?`.
        if !result.starts_with('?') {
            self.calls[call].result = Some(result.to_owned());
            self.moments.push(Moment::Returns(call));
        }
    }
}

impl Call {
    /// The file descriptor that is its first argument.
    pub(super) fn descriptor(&self) -> i32 {
        leading_number(&self.arguments).unwrap_or_else(|| panic!("{self:?}")) as i32
    }

    /// The same with strings as text, as far as they are.
    pub(super) fn arguments_plain(&self) -> String {
        String::from_utf8_lossy(&unescaped(&self.arguments)).into_owned()
    }

    /// The number that it returned, and the path of it if it is a file descriptor.
    pub(super) fn returned(&self) -> Option<(i64, String)> {
        let result = self.result.as_ref()?;
        let path = result.split_once('<').map_or("", |(_, path)| path.trim_end_matches('>'));
        Some((leading_number(result)?, String::from_utf8(unescaped(path)).unwrap()))
    }

    /// All strings among the arguments, as far as they are shown, and whether that is all of each.
    pub(super) fn strings(&self) -> Vec<(Vec<u8>, bool)> {
        let mut strings = Vec::new();
        let mut rest = self.arguments.as_str();
        while let Some((_, begun)) = rest.split_once('"') {
            let (text, after) = begun.split_once('"').unwrap();
            strings.push((unescaped(text), !after.starts_with("...")));
            rest = after;
        }
        strings
    }

    /// The numbers at its end, behind the last string.
    pub(super) fn last_numbers(&self) -> Vec<i64> {
        let end = self.arguments.rsplit('"').next().unwrap_or_default();
        end.split(", ").filter_map(leading_number).collect()
    }
}

fn leading_number(text: &str) -> Option<i64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(text.len());
    text[..digits].parse().ok()
}

/// Text in which bytes may be written as `\x5a`.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len() / 4);
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"\\x") {
            let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
            plain.push(digit(bytes[at + 2]) << 4 | digit(bytes[at + 3]));
            at += 4;
        } else {
            plain.push(bytes[at]);
            at += 1;
        }
    }
    plain
}

#[test]
fn calls_that_overlap_are_put_together() {
    let text = r#"7 openat(AT_FDCWD</a>, "\x61\x2f\x62", O_RDWR|O_CREAT, 0666) = 5</\x61\x2f\x62>
7 pwrite64(5</a/b>, "\x00\xff"..., 4096, 512 <unfinished ...>
8 fsync(5</a/b> <unfinished ...>
7 <... pwrite64 resumed>)           = 4096
8 <... fsync resumed>)              = 0
9 recvfrom(6<TCP:[1]>,  <unfinished ...>
9 <... recvfrom resumed>"\x48", 8192, 0, NULL, NULL) = 1
8 openat(AT_FDCWD</a>, "\x63", O_RDONLY) = -1 ENOENT (No such file or directory)
9 fdatasync(5</a/b> <unfinished ...>
9 <... fdatasync resumed>) = ?
7 +++ killed by SIGKILL +++
"#;
    let trace = Trace::parse(text);
    use Moment::{Begins, Returns};
    let expected = [
        [Begins(0), Returns(0)],
        [Begins(1), Begins(2)],
        [Returns(1), Returns(2)],
        [Begins(3), Returns(3)],
        [Begins(4), Returns(4)],
    ];
    assert_eq!(trace.moments[..10], expected.concat());
    assert_eq!(trace.moments[10..], [Begins(5)], "it never returned");
    let [open, write, sync, receive, missing, _] = &trace.calls[..] else { panic!("{trace:?}") };
    assert_eq!(open.strings(), [(b"a/b".to_vec(), true)]);
    assert_eq!(open.returned(), Some((5, "/a/b".to_owned())));
    assert_eq!((write.descriptor(), write.strings()), (5, vec![(vec![0, 255], false)]));
    assert_eq!(write.last_numbers(), [4096, 512]);
    assert_eq!((sync.name.as_str(), sync.returned().map(|(number, _)| number)), ("fsync", Some(0)));
    assert_eq!(receive.strings(), [(b"H".to_vec(), true)]);
    assert_eq!(missing.returned().map(|(number, _)| number), Some(-1));
}
