//! Stand-alone images: whole or not there at all.

mod support;

use std::fs;
use std::sync::Arc;

use crcoord_store::{ImageDirectory, PartReader, StoreError};
use support::*;

fn save_image(directory: &std::path::Path, memory: &Memory) -> Result<u64, StoreError> {
    let image = Arc::new(ImageDirectory::create(directory)?);
    let entries = write(image.clone(), memory)?;
    image.seal(&encode(entries, None))
}

#[test]
fn round_trip_and_no_overwriting() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("deep/image");
    let memory = memory(20);
    save_image(&directory, &memory).unwrap();
    let mut names: Vec<_> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["manifest", "pack"]);
    let image = ImageDirectory::open(&directory).unwrap();
    assert_eq!(load_from(image.manifest(), &image), memory);
    assert_eq!(image.chunks(), 21);
    assert!(matches!(
        save_image(&directory, &memory),
        Err(StoreError::Exists { .. })
    ));
    assert_eq!(
        load_from(image.manifest(), &ImageDirectory::open(&directory).unwrap()),
        memory
    );
}

#[test]
fn half_an_image_is_no_image() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("image");
    let no_image = || {
        matches!(
            ImageDirectory::open(&directory),
            Err(StoreError::NoImage { .. })
        )
    };
    assert!(no_image());
    let image = Arc::new(ImageDirectory::create(&directory).unwrap());
    write(image.clone(), &memory(5)).unwrap();
    assert!(no_image());
    assert!(matches!(
        ImageDirectory::create(&directory),
        Err(StoreError::InUse { .. })
    ));
    drop(image);
    assert!(
        !directory.exists(),
        "it was made for the image and goes with it"
    );
    // A dump that was killed leaves its partial files; the next one takes their place.
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join(".pack.partial"), b"left over").unwrap();
    fs::write(directory.join(".manifest.partial"), b"left over").unwrap();
    assert!(no_image());
    save_image(&directory, &memory(6)).unwrap();
    let image = ImageDirectory::open(&directory).unwrap();
    assert_eq!(load_from(image.manifest(), &image), memory(6));
    fs::remove_file(directory.join("manifest")).unwrap();
    assert!(no_image());
    assert!(matches!(
        save_image(&directory, &memory(6)),
        Err(StoreError::Exists { .. })
    ));
}

#[test]
fn damage_is_found_before_anything_is_built() {
    let root = tempfile::tempdir().unwrap();
    let (one, two) = (root.path().join("one"), root.path().join("two"));
    save_image(&one, &memory(8)).unwrap();
    let mut other = memory(9);
    other.insert(3, window(333));
    save_image(&two, &other).unwrap();
    let pack = one.join("pack");
    let whole = fs::read(&pack).unwrap();
    for length in [0, 10, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&pack, &whole[..length]).unwrap();
        let error = ImageDirectory::open(&one).unwrap_err();
        assert!(
            matches!(
                error,
                StoreError::Damaged { .. } | StoreError::Foreign { .. }
            ),
            "{error}"
        );
    }
    fs::copy(two.join("pack"), &pack).unwrap();
    let image = ImageDirectory::open(&one).unwrap();
    let manifest = decode(image.manifest());
    let report = PartReader::new(&manifest.body.memory, PAGE, &image).verify(2);
    assert!(
        matches!(report.damage[0].error, StoreError::Missing { .. }),
        "{report:?}"
    );
}
