//! A slice that a queue keeps its private state in: on the heap, or handed in
//! by a kernel that has none.
#![forbid(unsafe_code)]

use core::ops::{Deref, DerefMut};

/// An owned slice of fixed length.
#[derive(Debug)]
pub enum Storage<T: 'static> {
    /// On the heap.
    #[cfg(feature = "alloc")]
    Heap(alloc::boxed::Box<[T]>),
    /// Handed in for good.
    Static(&'static mut [T]),
}

impl<T> Storage<T> {
    /// `len` values on the heap, each made by `make`.
    #[cfg(feature = "alloc")]
    pub fn heap(len: usize, make: impl FnMut() -> T) -> Self {
        Self::Heap(core::iter::repeat_with(make).take(len).collect())
    }
}

impl<T> From<&'static mut [T]> for Storage<T> {
    fn from(slice: &'static mut [T]) -> Self {
        Self::Static(slice)
    }
}

impl<T> Deref for Storage<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match self {
            #[cfg(feature = "alloc")]
            Self::Heap(values) => values,
            Self::Static(values) => values,
        }
    }
}

impl<T> DerefMut for Storage<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            #[cfg(feature = "alloc")]
            Self::Heap(values) => values,
            Self::Static(values) => values,
        }
    }
}
